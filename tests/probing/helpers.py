"""What the tests of the probe share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dowser_peft.base_layer import linear_shape
from dowser_peft.fused_experts import FusedWeight, layers_named
from dowser_peft.probing import Sampling, collect_statistics
from dowser_peft.targets import default_targets
from tests import models


def collect(model: nn.Module, names: list[str] | None = None, **options: Any) -> Any:
    """``collect_statistics`` with small defaults: (activation per module, sensitivity per module, groups)."""
    modules = layers_named(model, names or default_targets(model))
    defaults: dict[str, Any] = {
        "num_prompts": 4,
        "num_probes": 3,
        "prompt_length": 6,
        "batches": None,
        "estimator": "rms",
        "sampling": Sampling(),
        "batch_size": None,
        "seed": 0,
        "tokenizer": None,
        "progress": False,
    }
    shapes = {
        name: module.expert_shape if isinstance(module, FusedWeight) else linear_shape(module)
        for name, module in modules.items()
    }
    found = collect_statistics(model, modules, shapes, **defaults | options)
    groups = found.input_groups
    return {name: found.activations[groups[name]] for name in modules}, found.sensitivities, groups


def fixed_signs(monkeypatch: pytest.MonkeyPatch, signs: torch.Tensor) -> None:
    """Let every prompt be probed with ``signs`` ``[R, d]``."""

    def given(output: torch.Tensor, real: Any, num_probes: int, seed: int, first: int) -> Iterator[torch.Tensor]:
        return (row.expand_as(output) for row in signs)

    monkeypatch.setattr("dowser_peft.probing.collect.random_signs", given)


def prompts(rows: int = 3, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(9, models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
