"""Weighted combinations of adapters: sparse deltas in, a sparse delta out.

The result trains wherever one of its parts does. Each part is pruned on its own values, then spread over the union
with zeros in between, and combined entry by entry with PEFT's functions; so the result is that of the same functions
on dense deltas, without a dense delta ever existing. ``density`` is the share of a part's own values that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune, reshape_weight_task_tensors

from dowser_peft.config import DowserConfig
from dowser_peft.tuner_layer import DowserLayer

CombinationType = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
MajoritySignMethod = Literal["total", "frequency"]


def check_combination(
    configs: dict[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """Refuse what cannot be combined, before anything is.

    Raises:
        ValueError: naming the argument or the adapter.
    """
    if adapter_name in configs:
        raise ValueError(f"there already is an adapter {adapter_name!r}: delete it first, or choose another name")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"Adapter {name} does not exist; there are {sorted(configs)}")
        if not isinstance(configs[name], DowserConfig):
            raise ValueError(f"adapter {name!r} is no Dowser adapter: only those can be combined")
        if configs[name].bias != "none":
            raise ValueError(
                f"adapter {name!r} has bias={configs[name].bias!r}: trained biases belong to the base layers and "
                "cannot be combined"
            )
        if configs[name].modules_to_save:
            raise ValueError(
                f"adapter {name!r} has modules that it saves in full, {sorted(configs[name].modules_to_save)}, and "
                "those cannot be combined"
            )
    if not adapters:
        raise ValueError("there are no adapters to combine: adapters is empty")
    if len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters take as many weights, got {len(weights)}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, got {list(weights)}")
    if combination_type not in get_args(CombinationType):
        raise ValueError(
            f"Invalid combination_type: {combination_type}; for Dowser it is one of {get_args(CombinationType)}"
        )
    if combination_type != "linear" and (density is None or not 0 <= density <= 1):
        raise ValueError(
            f"combination_type={combination_type!r} needs density, the share of each adapter's values to keep, in "
            f"[0, 1]; got {density}"
        )
    if majority_sign_method not in get_args(MajoritySignMethod):
        raise ValueError(
            f"majority_sign_method must be one of {get_args(MajoritySignMethod)}, got {majority_sign_method!r}"
        )
    if len(found := {configs[name].granularity for name in adapters}) > 1:
        raise ValueError(f"adapters of different granularity cannot be combined: {sorted(found)}")


def combine_values(
    layer: DowserLayer,
    selection: torch.Tensor,
    parts: Sequence[tuple[str, float]],
    combination_type: str,
    density: float | None,
    majority_sign_method: Any,
) -> torch.Tensor:
    """The values of the combination in one layer.

    Args:
        layer: that holds the adapters.
        selection: the union of theirs.
        parts: (adapter, weight) of those that are in this layer.
        combination_type, density, majority_sign_method: as of :meth:`DowserModel.add_weighted_adapter`.
    """
    aligned = []
    for name, _ in parts:
        values = layer.dowser_values[name].detach()
        if combination_type != "linear" and density is not None and density < 1:
            at_random = combination_type.startswith("dare")
            values = prune(values, density, method="random" if at_random else "magnitude", rescale=at_random)
        aligned.append(layer.spread(values, name, selection))
    stacked = torch.stack(aligned)
    weights = torch.tensor([weight for _, weight in parts], dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * reshape_weight_task_tensors(stacked, weights)
    if combination_type in ("ties", "dare_ties"):
        return disjoint_merge(weighted, calculate_majority_sign_mask(stacked, method=majority_sign_method))
    return weighted.sum(dim=0)
