"""Experts of a mixture that are fused into one parameter, seen as the layers that they are.

transformers 5 stores all experts of a layer in parameters of three dimensions:

    experts.gate_up_proj   [E, 2 * intermediate, hidden]    (``up_proj`` where there is no gate)
    experts.down_proj      [E, hidden, intermediate]        both [E, in, out] where the module says ``is_transposed``

Each expert is a matrix of its own with scores and a mask of its own. An adapter sees the parameter as it lies, as one
matrix of ``E * rows`` rows: then its mask is one packed buffer and its delta one vector, one expert after another.

Known are the modules made by transformers' ``use_experts_implementation``, which say how they store and compute, and
those of Llama 4, which multiply every token with every expert, of those that are not sent to it a zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import nn

_DENSE = "Llama4TextExperts"  # stored [E, in, out]
_BASE_LAYER = ".base_layer"  # what PEFT calls the module under an adapter


class FusedWeight:
    """One fused parameter. It has the attributes of a linear layer, but is no module: it owns nothing.

    Args:
        experts: the module that owns the parameter.
        parameter_name: its name there.
    """

    bias = None

    def __init__(self, experts: nn.Module, parameter_name: str) -> None:
        self.experts, self.parameter_name = experts, parameter_name
        self.num_experts, self.rows, self.columns = self.parameter.shape  # of an expert as it lies
        self.out_features, self.in_features = self.num_experts * self.rows, self.columns  # as one matrix

    @property
    def parameter(self) -> torch.Tensor:
        """``[E, rows, columns]``, as it is stored."""
        return getattr(self.experts, self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        """The parameter as one matrix ``[E * rows, columns]``, in the same memory."""
        return self.parameter.view(self.out_features, self.in_features)

    @property
    def is_transposed(self) -> bool:
        """Whether an expert lies as [in, out]."""
        return is_dense(self.experts) or bool(getattr(self.experts, "is_transposed", False))

    @property
    def expert_shape(self) -> tuple[int, int]:
        """(out, in) of one expert."""
        return (self.columns, self.rows) if self.is_transposed else (self.rows, self.columns)

    def expert(self, index: int) -> torch.Tensor:
        """The weight of one expert, [out, in], in the same memory."""
        matrix = self.parameter.detach()[index]
        return matrix.T if self.is_transposed else matrix

    @property
    def experts_per_token(self) -> int:
        """How many experts a token is sent to; all of them if the configuration does not tell."""
        config = getattr(self.experts, "config", None)
        stated = (getattr(config, name, None) for name in ("num_experts_per_tok", "moe_topk", "top_k_experts"))
        return next((n for n in stated if isinstance(n, int) and 0 < n <= self.num_experts), self.num_experts)

    def is_offloaded(self) -> bool:
        """Whether accelerate brings the parameter back only while the module runs."""
        return has_offloaded_params(self.experts)


def is_dense(experts: nn.Module) -> bool:
    """Whether the module takes ``[E * tokens, in]``, and leaves it to its caller to choose."""
    return type(experts).__name__ == _DENSE


def fused_weight_names(module: nn.Module) -> list[str]:
    """Names of the fused parameters of an experts module, in the order of computation; none of any other module."""
    if not is_dense(module) and not all(hasattr(module, name) for name in ("has_bias", "is_transposed", "config")):
        return []
    names = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    weights: list[Any] = [getattr(module, name, None) for name in names]
    return names if all(isinstance(w, torch.Tensor) and w.ndim == 3 for w in weights) else []


def fused_weights(model: nn.Module) -> Iterator[tuple[str, FusedWeight]]:
    """Every fused parameter with its full name in the model without adapters, in the order of the model."""
    for name, module in model.named_modules():
        for parameter_name in fused_weight_names(module):
            yield unwrapped_name(f"{name}.{parameter_name}").lstrip("."), FusedWeight(module, parameter_name)


def unwrapped_name(name: str) -> str:
    """The name that a module or parameter has in the model without adapters."""
    return name.replace(_BASE_LAYER, "")


def layers_named(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """What the names of targets stand for: linear layers, or fused parameters as a :class:`FusedWeight`.

    Raises:
        AttributeError: if there is no such module.
    """
    fused = dict(fused_weights(model))
    return {name: fused[name] if name in fused else model.get_submodule(name) for name in names}


def expert_name(parameter_name: str, index: int) -> str:
    """What one expert of a fused parameter is called in statistics and messages."""
    return f"{parameter_name}.{index}"


def expert_names(name: str, layer: Any) -> list[str]:
    """What has scores of its own in a target: every expert of a fused parameter, or the layer itself."""
    return (
        [expert_name(name, index) for index in range(layer.num_experts)] if isinstance(layer, FusedWeight) else [name]
    )


def probed_layers(model: nn.Module, names: Iterable[str]) -> dict[str, Any] | None:
    """The linear layers and fused parameters that statistics of these names are of; None if one is missing."""
    present = dict(model.named_modules())
    fused = dict(fused_weights(model))
    owner = {part: name for name, weight in fused.items() for part in expert_names(name, weight)}
    found: dict[str, Any] = {}
    for name in names:
        if name in owner:
            found[owner[name]] = fused[owner[name]]
        elif name in present:
            found[name] = present[name]
        else:
            return None
    return found
