"""Which fused parameters of experts are meant, and whether they can be adapted."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from dowser_peft.base_layer import FLOAT_DTYPES
from dowser_peft.config import DowserConfig
from dowser_peft.fused_experts import FusedWeight, fused_weights, unwrapped_name
from dowser_peft.ranks import receives_masks
from dowser_peft.targets import default_parameters, warn_about_frozen_experts


def resolve_parameters(model: nn.Module, config: DowserConfig, by_default: bool) -> list[str]:
    """Names of the fused parameters to adapt, in model order; ``config.target_parameters`` is set to match them.

    Args:
        model: the model.
        config: the configuration; its ``target_modules`` need not be resolved yet.
        by_default: whether all targets are the default ones, of this or of an earlier model.

    Raises:
        TypeError: if a parameter is meant that is not one of fused experts.
        ValueError: if an entry of ``target_parameters`` matches nothing.
    """
    if not by_default:
        if config.target_parameters is None and config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            warn_about_frozen_experts(model, [], "they are no linear layers; name them in target_parameters")
        matched = _matched(model, config.target_parameters or [])
        kept = _not_excluded(config, matched)
        if kept != matched:
            config.target_parameters = kept
        return kept
    config.target_parameters = None
    if config.granularity == "column":
        warn_about_frozen_experts(
            model, [], "granularity='column' does not support fused experts (target_parameters), 'element' does"
        )
        return []
    matched = default_parameters(model)
    warn_about_frozen_experts(
        model, matched, "they are fused in a way of their own, no plain floats, or offloaded, and have no adapter"
    )
    kept = _not_excluded(config, matched)
    config.target_parameters = kept or None
    return kept


def _matched(model: nn.Module, wanted: Any) -> list[str]:
    fused = [name for name, _ in fused_weights(model)]
    for target in wanted:
        if any(_ends(name, target) for name in fused):
            continue
        names = (unwrapped_name(name) for name, _ in model.named_parameters())
        other = next((name for name in names if _ends(name, target)), None)
        if other is not None:
            raise TypeError(
                f"target_parameters: {other!r} is not supported. Only experts that transformers fuses into parameters "
                "of three dimensions are; of a linear layer, name the module in target_modules"
            )
        example = f"there are, for example, {fused[:2]}" if fused else "this model has no fused experts"
        raise ValueError(f"target_parameters: {target!r} matches no parameter; {example}")
    return [name for name in fused if any(_ends(name, target) for target in wanted)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _not_excluded(config: DowserConfig, names: list[str]) -> list[str]:
    """Without those that ``exclude_modules``, ``modules_to_save`` or ``layers_to_transform`` leave out."""
    module_of = {name: name.rpartition(".")[0] for name in names}
    endings = {name.rpartition(".")[2] for name in (*module_of, *module_of.values())}
    rule = dataclasses.replace(config, target_modules=sorted(endings), target_parameters=None)
    return [
        name
        for name, module in module_of.items()
        if check_target_module_exists(rule, name) and check_target_module_exists(rule, module)
    ]


def check_parameters(model: nn.Module, names: list[str], is_fresh: bool) -> None:
    """Refuse fused parameters that cannot be adapted, before anything is probed or replaced.

    Raises:
        TypeError: if the parameter is not of plain floats, or its module has an adapter of another method.
        ValueError: if it is sharded over devices, offloaded, not contiguous, or not at hand to be scored.
    """
    fused = dict(fused_weights(model))
    for name in names:
        weight: FusedWeight = fused[name]
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, BaseTunerLayer):
            raise TypeError(
                f"Target parameter {name!r} is not supported: its module already carries an adapter "
                f"({type(module).__module__}.{type(module).__name__}). Adapt other parameters, or merge or unload "
                "that adapter first"
            )
        if weight.parameter.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"Target parameter {name!r} is not supported: it is stored as {weight.parameter.dtype}. Load the "
                "experts in bfloat16 or float32, or leave them out with exclude_modules"
            )
        if not weight.parameter.is_contiguous():
            raise ValueError(
                f"Target parameter {name!r} is not supported: its experts do not lie one after another in memory. "
                "Make it contiguous, or leave it out with exclude_modules"
            )
        if getattr(weight.experts, "_is_expert_parallel", False):
            raise ValueError(
                f"Target parameter {name!r} is not supported: its experts are sharded over devices (expert "
                "parallelism). Load the model without it, or leave them out with exclude_modules"
            )
        if weight.is_offloaded():
            raise ValueError(
                f"Target parameter {name!r} is offloaded, which is not supported for fused experts: keep it in memory "
                "(max_memory, device_map), or leave it out with exclude_modules"
            )
        if is_fresh and weight.parameter.device.type == "meta" and not receives_masks():
            raise ValueError(
                f"Target parameter {name!r} is on the meta device, so it cannot be scored: load the model with its "
                "weights before adding a new adapter"
            )
