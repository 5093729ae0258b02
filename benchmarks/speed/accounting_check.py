"""The account against reality: the same terms of a small model, built and trained for real on the CPU.

What stands still is walked tensor by tensor and must agree to the byte. Activations and temporaries are the peak
of torch's own allocation events in one forward and backward pass, in which the insides of every kernel are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.account import Account
from benchmarks.speed.storage_tracker import profiled_peak_bytes
from dowser_peft import DowserConfig
from dowser_peft.layer import Linear
from dowser_peft.sparse_delta import scratch
from dowser_peft.targets import default_targets
from dowser_peft.tuner_layer import DowserLayer

# Square layers, and rho = 1/8: so that SHiRA, whose count is rank * (in + out), trains exactly as many weights.
RHO = 0.125
SQUARE = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "square": SQUARE | {"vocab_size": 4096},
    "35m": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
}
PREFIXES = ("dowser_", "lora_", "shira_", "supertuning_")


def measure(
    config: transformers.PretrainedConfig,
    method: str,
    *,
    base: str,
    tokens: int,
    batch: int = 1,
    checkpointing: bool,
    rank: int = 64,
) -> Account:
    """The account of a real training step on the CPU with AdamW; the peak is all in ``activations``."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, base))
    masks = ADAPT[method](model, rank)
    adapted: Any = masks.pop("model", model)
    adapted.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(config.vocab_size, (batch, tokens))

    def step() -> None:
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first_update:
        optimizer.step()
    scratch.release()  # so that the profile sees it come
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as micro_batch:
        step()
    states = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    sizes = [parameter.numel() for parameter in trained]
    own = {name: t for name, t in adapted.named_parameters() if any(prefix in name for prefix in PREFIXES)}
    own_ids = {id(t) for t in own.values()}
    base_tensors = [t for t in _tensors(model) if id(t) not in own_ids and not _is_of_adapter(model, t)]
    indices = [layer.positions("default") for layer in model.modules() if isinstance(layer, Linear)]
    for layer in model.modules():
        indices += list(getattr(layer, "shira_indices", {}).values())
        indices += [t for _, t in getattr(layer, "supertuning_indices", nn.Module()).named_buffers()]
        if isinstance(layer, DowserLayer):
            masks[f"{id(layer)}"] = layer.selections["default"]
    return Account(
        method=method,
        trained_parameters=sum(sizes),
        base_weights=sum(t.nbytes for t in base_tensors),
        master_weights=0,
        values=sum(t.nbytes for t in own.values()),
        masks=sum(t.nbytes for t in masks.values()),
        indices=sum(t.nbytes for t in indices),
        optimizer_states=states,
        gradients=sum(p.grad.nbytes for p in trained if p.grad is not None),
        activations=profiled_peak_bytes(micro_batch),
        temporary=0,
        largest_temporary=0,
        optimizer_temporary=profiled_peak_bytes(first_update) - states,
    )


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _is_of_adapter(model: nn.Module, tensor: torch.Tensor) -> bool:
    return any(t is tensor for name, t in model.named_buffers() if any(prefix in name for prefix in PREFIXES))


def _targets(model: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in default_targets(model)})


def _dowser(model: Any, rank: int, **options: Any) -> dict[str, Any]:
    config = DowserConfig(rho=RHO, importance="magnitude", **options)
    return {"model": get_peft_model(model, config)}


def _peer(make: Callable[[list[str], int], peft.PeftConfig]) -> Callable[[Any, int], dict[str, Any]]:
    return lambda model, rank: {"model": get_peft_model(model, make(_targets(model), rank))}


def _full(model: Any, rank: int) -> dict[str, Any]:
    model.requires_grad_(False)
    for name in default_targets(model):
        model.get_submodule(name).weight.requires_grad_(True)
    return {}


def _masked_full(model: Any, rank: int) -> dict[str, Any]:
    _full(model, rank)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.requires_grad}
    for name, mask in masks.items():
        model.get_parameter(name).register_hook(lambda gradient, mask=mask: torch.where(mask, gradient, 0.0))
    return masks


def _shira_rank(rank: int) -> int:
    return round(RHO * SQUARE["hidden_size"] / 2)


ADAPT: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "Dowser": _dowser,
    "Dowser column": partial(_dowser, granularity="column"),
    "masked full fine-tuning": _masked_full,
    "full fine-tuning": _full,
    "LoRA": _peer(lambda targets, rank: LoraConfig(r=rank, target_modules=targets)),
    "SHiRA": _peer(lambda targets, rank: ShiraConfig(r=_shira_rank(rank), target_modules=targets)),
    "Super-Tuning": _peer(lambda targets, rank: SupertuningConfig(sparsity=1 - RHO, target_modules=targets)),
}
