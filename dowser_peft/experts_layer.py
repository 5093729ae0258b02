"""Experts that are fused parameters, under adapters.

    Experts             takes the place of the experts module, and holds beside it, by the name of the parameter,
      .base_layer       the experts module
      .gate_up_proj     FusedExperts: the adapters of that parameter
      .down_proj        FusedExperts

so that an adapter's values are called ``...experts.gate_up_proj.dowser_values``, after what they change.

The experts module computes as ever, in whatever implementation is active (eager, batched_mm, grouped_mm), with its
parameters replaced by their effective weights ``W + scatter(values)`` for the call. These are as large as the
parameters, but exist for one layer at a time: the backward pass builds them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from dowser_peft.fused_experts import FusedWeight
from dowser_peft.layer import Linear
from dowser_peft.scoring import num_trainable
from dowser_peft.sparse_delta import rebuilt_in_backward, scatter_delta, sparse_delta_weight


class FusedExperts(Linear):
    """A Dowser adapter on single weights of all experts of a fused parameter, as many of each expert.

    ``dowser_values`` is ``[E * k]`` and ``dowser_mask`` one bit per weight of the parameter as it lies, the experts
    one after another.
    """

    def __init__(self, base_layer: FusedWeight, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)  # type: ignore[arg-type]

    def values_shape(self, rho: float) -> tuple[int, ...]:
        base: Any = self.get_base_layer()
        return (base.num_experts * num_trainable(base.rows * base.columns, rho),)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        base: Any = self.get_base_layer()
        return super().get_delta_weight(adapter).view(base.num_experts, base.rows, base.columns)

    def effective(self) -> tuple[torch.Tensor, Callable[[], torch.Tensor]] | None:
        """The parameter ``[E, rows, columns]`` with the active adapters, and how to build it again; None without any.

        Adapters that are merged are in the parameter already; while adapters are disabled, none is.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return None
        masks, values = self._active_deltas()
        if not values:
            return None
        base: Any = self.get_base_layer()
        weight, shape = base.weight, base.parameter.shape

        def again() -> torch.Tensor:
            return scatter_delta(weight, masks, values).view(shape)

        return sparse_delta_weight(weight, masks, values).view(shape), self._until_written(again)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("the parameter of an experts module is no layer to call: call the experts module")


class Experts(nn.Module):
    """An experts module with adapters on its fused parameters.

    Args:
        base_layer: the experts module.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training

    def adapted(self) -> Iterator[tuple[str, FusedExperts]]:
        """The parameters that have adapters, by name."""
        for name, layer in self.named_children():
            if isinstance(layer, FusedExperts):
                yield name, layer

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = {name: layer.effective() for name, layer in self.adapted()}
        effective = {name: pair for name, pair in found.items() if pair is not None}
        if not effective:
            return self.base_layer(*args, **kwargs)
        weights = {name: weight for name, (weight, _) in effective.items()}
        with rebuilt_in_backward(list(weights.values()), [again for _, again in effective.values()]):
            return functional_call(self.base_layer, weights, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge into every parameter; see :meth:`DowserLayer.merge`."""
        for _, layer in self.adapted():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)


def adapt_parameter(
    model: nn.Module,
    name: str,
    adapter_name: str,
    rho: float,
    where: torch.Tensor | None,
    options: dict[str, Any],
) -> FusedExperts:
    """Add an adapter to the fused parameter ``name`` of ``model``; arguments as of the layer."""
    module_name, _, parameter_name = name.rpartition(".")
    experts = model.get_submodule(module_name)
    if not isinstance(experts, Experts):
        experts = Experts(experts)
        parent, _, child = module_name.rpartition(".")
        setattr(model.get_submodule(parent), child, experts)
    layer = getattr(experts, parameter_name, None)
    if isinstance(layer, FusedExperts):
        layer.update_layer(adapter_name, rho, where, **options)
        return layer
    layer = FusedExperts(FusedWeight(experts.base_layer, parameter_name), adapter_name, rho, where, **options)
    layer.train(experts.training)
    experts.add_module(parameter_name, layer)
    return layer


def unwrap_experts(model: nn.Module) -> None:
    """Put back the experts modules that have no adapters left."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts) and not any(True for _ in module.adapted()):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
