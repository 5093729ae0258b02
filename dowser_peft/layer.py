"""Linear: a frozen linear layer plus sparse trainable deltas, one per adapter.

    dowser_values.<adapter>   Parameter [k], float32: the delta, zero at the start, in the row-major order of
                              the masked positions of the stored weight
    dowser_mask.<adapter>     persistent uint8 buffer [ceil(numel / 8)]: where, one bit per weight

The mask is the only stored truth of where; flat positions are derived from it and cached.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from dowser_peft import bitmask
from dowser_peft.base_layer import is_transposed, onloaded, stored_dtype
from dowser_peft.partitioned import gather_for, is_of_engine
from dowser_peft.scoring import num_trainable
from dowser_peft.sparse_delta import add_once_rounded, marked, positions_of, scatter_delta, sparse_delta_linear
from dowser_peft.tuner_layer import DowserLayer

# Dequantising (bitsandbytes' weights are tensor subclasses that Dynamo cannot look into) and bringing back what is
# offloaded run outside the compiled graph.
_uncompiled_sparse_delta_linear = torch.compiler.disable(sparse_delta_linear)

# PEFT backends whose dequantised weight is a new tensor each time; the others may return stored data.
_DEQUANTISE_ANEW = ("bnb 4bit", "bnb 8bit")


class Linear(DowserLayer):
    """A Dowser adapter on single weights of ``nn.Linear``, transformers' ``Conv1D``, or a quantised linear layer.

    ``y = x (W + scatter(values))^T + b``; see :mod:`dowser_peft.sparse_delta`. A merge writes exactly the
    effective weight that forward uses, so merged and unmerged outputs agree bit for bit.
    """

    other_param_names: tuple[str, ...] = ("dowser_mask",)
    granularity = "element"
    selection_name = "dowser_mask"
    dowser_mask: BufferDict

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        rho: float,
        mask: torch.Tensor | None,
        init_weights: bool = True,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name, rho, mask, init_weights, inference_mode, **kwargs)
        self.fan_in_fan_out = is_transposed(self.get_base_layer())
        self._warned_about_base_hooks = False

    def values_shape(self, rho: float) -> tuple[int, ...]:
        return (num_trainable(self.numel, rho),)

    def empty_selection(self, rho: float) -> torch.Tensor:
        return torch.zeros(bitmask.packed_size(self.numel), dtype=torch.uint8)

    def is_waiting(self, adapter_name: str) -> bool:
        return self._num_marked(adapter_name) == 0

    def _num_marked(self, adapter_name: str) -> int:
        """Weights that the mask marks: as many as there are values, or none.

        Raises:
            RuntimeError: if the mask does not belong to the values.
        """
        found, size = marked(self.dowser_mask[adapter_name], self.numel), self.dowser_values[adapter_name].numel()
        if found not in (0, size):
            raise RuntimeError(
                f"adapter {adapter_name!r}: the mask marks {found} weights but there are {size} "
                "values; they come from different adapters. Load the adapter again from its file"
            )
        return found

    def positions(self, adapter_name: str) -> torch.Tensor:
        """Flat indices ``[k]`` of an adapter's weights in the stored weight; empty while it waits for its file.

        Raises:
            RuntimeError: if the mask does not belong to the values.
        """
        self._num_marked(adapter_name)
        mask = self.dowser_mask[adapter_name]
        # On a GPU training reads the mask itself: there positions are needed to merge, and not worth their memory.
        found = positions_of(mask, self.numel) if mask.device.type == "cpu" else bitmask.positions(mask, self.numel)
        return found.to(self.dowser_values[adapter_name].device)

    def _active_deltas(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Masks and values of the active adapters of this layer."""
        masks, values = [], []
        for name in self.active_adapters:
            if name not in self.dowser_values:
                continue
            # A compiled layer decides at run time: there an empty mask adds nothing, and refuses to train.
            if not torch.compiler.is_compiling():
                gather_for(self, [self.dowser_values[name]])
                if self.is_waiting(name):
                    self._check_may_train(name)
                    continue
            masks.append(self.dowser_mask[name].to(self.dowser_values[name].device))
            values.append(self.dowser_values[name])
        return masks, values

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        values = self.dowser_values[adapter]
        shape = (self.out_features, self.in_features)
        if is_transposed(self.get_base_layer()):
            shape = shape[::-1]
        delta = torch.zeros(self.numel, dtype=values.dtype, device=values.device)
        where = self.positions(adapter)
        if where.numel():
            delta = delta.index_add(0, where, values)
        return delta.view(shape)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        masks, values = self._active_deltas()
        if not values:
            return self.base_layer(x, *args, **kwargs)

        self._warn_once_about_base_hooks()
        base: Any = self.get_base_layer()
        if not torch.compiler.is_compiling():
            gather_for(self, [getattr(base, "weight", None), base.bias])
        autocast = torch.is_autocast_enabled(x.device.type) and stored_dtype(base) != torch.float64
        if autocast:  # which leaves float64 alone
            compute_dtype = torch.get_autocast_dtype(x.device.type)
        elif self.quantization_backend is not None:
            compute_dtype = getattr(base, "compute_dtype", None) or x.dtype
        else:
            compute_dtype = None
        weight: Any
        if self.quantization_backend is not None:
            weight, bias = self._until_written(self.get_base_weight), base.bias
        elif has_offloaded_params(base):  # brought back for forward, and again for backward
            weight, bias = self._until_written(partial(onloaded, base, "weight")), onloaded(base, "bias")
        else:
            weight, bias = base.weight, base.bias
        apply = _uncompiled_sparse_delta_linear if callable(weight) else sparse_delta_linear
        y = apply(
            x,
            weight,
            bias,
            masks,
            values,
            fan_in_fan_out=self.fan_in_fan_out,
            compute_dtype=compute_dtype,
            weight_is_temporary=getattr(self.quantization_backend, "backend_name", None) in _DEQUANTISE_ANEW,
        )
        if self.quantization_backend is not None and not autocast:
            y = y.to(x.dtype)  # as bitsandbytes does
        return y

    def union(self, adapter_names: Sequence[str]) -> torch.Tensor:
        first, *others = (self.dowser_mask[name] for name in adapter_names)
        return reduce(torch.bitwise_or, others, first.clone())  # never a mask that another adapter holds

    def spread(self, values: torch.Tensor, adapter_name: str, selection: torch.Tensor) -> torch.Tensor:
        chosen, own = (bitmask.unpack(mask, self.numel) for mask in (selection, self.dowser_mask[adapter_name]))
        result = values.new_zeros(bitmask.count(selection))
        result[own[chosen].to(values.device)] = values
        return result

    def _effective_weight(self, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
        values = self.dowser_values[adapter_name]
        return scatter_delta(weight, [self.positions(adapter_name)], [values.to(weight.device)])

    def _selected_entries(self, weight: torch.Tensor, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        where = self.positions(adapter_name)
        return where, weight.reshape(-1).index_select(0, where)

    def _merged_entries(self, entries: torch.Tensor, adapter_name: str) -> torch.Tensor:
        return add_once_rounded(entries, self.dowser_values[adapter_name].detach().to(entries.device))

    def _write_entries(self, weight: torch.Tensor, where: torch.Tensor, entries: torch.Tensor) -> None:
        flat = weight.reshape(-1)
        flat[where.to(weight.device)] = entries.to(weight.device, weight.dtype)
        if not weight.is_contiguous():  # then ``flat`` is a copy
            weight.copy_(flat.view(weight.shape))

    def _warn_once_about_base_hooks(self) -> None:
        base = self.get_base_layer()
        kinds = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        hooks = [hook for kind in kinds for hook in kind.values() if not is_of_engine(hook)]
        if hooks and not self._warned_about_base_hooks:
            self._warned_about_base_hooks = True
            warnings.warn(
                "A base layer adapted with Model-Dowser has forward or backward hooks, which are bypassed: the "
                "adapter reads its weight directly. Register them on the adapted layer instead (the same path, "
                "after the adapter has been added).",
                stacklevel=3,
            )
