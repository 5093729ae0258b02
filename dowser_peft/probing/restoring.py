"""A model that leaves a probe exactly as it came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dowser_peft.probing.forward import input_device


@contextmanager
def as_it_came(model: nn.Module, seed: int) -> Iterator[None]:
    """Probe in eval mode, without parameter gradients and without gradient checkpointing; then undo all."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpointed: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    precision = torch.autocast(input_device(model).type, enabled=False)  # that of the weights, whoever calls
    with torch.random.fork_rng(devices=gpus), torch.inference_mode(False), torch.enable_grad(), precision:
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            for module in checkpointed:
                module.gradient_checkpointing = False
            # Not torch.manual_seed: before CUDA is initialised, it would leave a seed behind for later.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, mode in training:
                module.training = mode
