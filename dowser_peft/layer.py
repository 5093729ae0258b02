"""DowserLayer: a frozen linear layer plus sparse trainable deltas, one per adapter.

What is kept per adapter:

    dowser_values.<adapter>   Parameter [k], float32: the delta, zero at the start, in the row-major order of
                              the masked positions of the stored weight
    dowser_mask.<adapter>     persistent uint8 buffer [ceil(numel / 8)]: where, one bit per weight

The mask is the only stored truth of where; flat positions are derived from it and cached. An adapter whose
mask has no bit set is waiting for its file: it computes nothing and must not train.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from dowser_peft import bitmask
from dowser_peft.base_layer import is_transposed, linear_shape, onloaded, unpack_4bit
from dowser_peft.scoring import num_trainable
from dowser_peft.sparse_delta import marked, positions_of, scatter_delta, sparse_delta_linear

# PEFT backends whose dequantised weight is a new tensor each time; the others may return stored data.
_DEQUANTISE_ANEW = ("bnb 4bit", "bnb 8bit")


class DowserLayer(BaseTunerLayer):
    """State of the adapters of one linear layer."""

    adapter_layer_names: tuple[str, ...] = ("dowser_values",)
    other_param_names: tuple[str, ...] = ("dowser_mask",)

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.dowser_values = nn.ParameterDict()
        self.dowser_mask = BufferDict(persistent=True)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting sets it
        self.merged_adapters: list[str] = []
        self.base_fingerprint: dict[str, str | None] = {}  # adapter -> base weights its mask was chosen for
        self._warned_about_base_hooks = False
        # adapter -> where and what its merge overwrote, to restore it bit for bit
        self._overwritten: dict[str, Any] = {}

        base: Any = self.get_base_layer()
        self.out_features, self.in_features = linear_shape(base)
        if hasattr(base, "support_avx512bf16_for_cpu"):
            base.support_avx512bf16_for_cpu = False  # bitsandbytes must not rearrange what we read
            unpack_4bit(base)

    @property
    def numel(self) -> int:
        """Weights of the base layer."""
        return self.in_features * self.out_features

    def update_layer(
        self,
        adapter_name: str,
        rho: float,
        mask: torch.Tensor | None,
        init_weights: bool,
        inference_mode: bool = False,
    ) -> None:
        """Allocate an adapter.

        Args:
            adapter_name: its name.
            rho: fraction of the weights that train.
            mask: packed mask, or None for an adapter whose file is about to be loaded.
            init_weights: start at zero (True) or at random values (False).
            inference_mode: whether the values are frozen.
        """
        size = num_trainable(self.numel, rho)
        values = torch.zeros(size) if init_weights else 0.1 * torch.randn(size)
        if mask is None:
            mask = torch.zeros(bitmask.packed_size(self.numel), dtype=torch.uint8)
        self.dowser_values[adapter_name] = nn.Parameter(values)
        self.dowser_mask[adapter_name] = mask
        self._move_new_adapter(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_new_adapter(self, adapter_name: str) -> None:
        if self.dowser_values[adapter_name].device.type == "meta":  # low_cpu_mem_usage: the file brings the data
            return
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        values = self.dowser_values[adapter_name]
        if dtype is None or not dtype.is_floating_point:
            dtype = values.dtype
        if device is not None and device.type == "meta":  # an offloaded base: where it runs
            hook = getattr(self.get_base_layer(), "_hf_hook", None)
            device = torch.device(getattr(hook, "execution_device", None) or values.device)
        self.dowser_values[adapter_name] = nn.Parameter(values.detach().to(device, dtype))
        self.dowser_mask[adapter_name] = self.dowser_mask[adapter_name].to(device)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move, but never cast: PEFT calls this on loaded values, which a bfloat16 base would round."""
        if adapter_name not in self.dowser_values or self.dowser_values[adapter_name].device.type == "meta":
            return
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None or device.type == "meta":
            return
        values = self.dowser_values[adapter_name]
        if values.device != device:
            self.dowser_values[adapter_name] = nn.Parameter(values.detach().to(device), values.requires_grad)
        self.dowser_mask[adapter_name] = self.dowser_mask[adapter_name].to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.base_fingerprint.pop(adapter_name, None)

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Give the values the dtype of the base weight, unless that is an integer type."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        values = self.dowser_values[adapter_name]
        if dtype is not None and dtype.is_floating_point and values.dtype != dtype:
            self.dowser_values[adapter_name] = nn.Parameter(values.detach().to(dtype), values.requires_grad)

    def is_waiting(self, adapter_name: str) -> bool:
        """Whether the adapter was allocated for a file that has not been loaded yet."""
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
            if not torch.compiler.is_compiling() and self.is_waiting(name):
                if torch.is_grad_enabled() and self.dowser_values[name].requires_grad:
                    raise RuntimeError(
                        f"adapter {name!r} cannot train: in some layer its mask has not been loaded. Either it was "
                        "created from the configuration of a saved adapter or with low_cpu_mem_usage (to train a "
                        "saved one use PeftModel.from_pretrained(base, path, is_trainable=True), to start a new one "
                        "a fresh DowserConfig), or its file lacks a module that this model has"
                    )
                continue
            masks.append(self.dowser_mask[name].to(self.dowser_values[name].device))
            values.append(self.dowser_values[name])
        return masks, values

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Dense delta of an adapter, in the shape of the stored weight and the dtype of the values."""
        values = self.dowser_values[adapter]
        shape = (self.out_features, self.in_features)
        if is_transposed(self.get_base_layer()):
            shape = shape[::-1]
        delta = torch.zeros(self.numel, dtype=values.dtype, device=values.device)
        where = self.positions(adapter)
        if where.numel():
            delta = delta.index_add(0, where, values)
        return delta.view(shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a sparse delta has full rank: its low-rank approximation is not the adapter


class Linear(nn.Module, DowserLayer):
    """A Dowser adapter on ``nn.Linear``, transformers' ``Conv1D``, or a quantised linear layer.

    ``y = x (W + scatter(values))^T + b``; see :mod:`dowser_peft.sparse_delta`.
    """

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
        super().__init__()
        DowserLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = is_transposed(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rho, mask, init_weights, inference_mode)

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
        autocast = torch.is_autocast_enabled(x.device.type) and base.weight.dtype != torch.float64
        if autocast:  # which leaves float64 alone
            compute_dtype = torch.get_autocast_dtype(x.device.type)
        elif self.quantization_backend is not None:
            compute_dtype = getattr(base, "compute_dtype", None) or x.dtype
        else:
            compute_dtype = None
        weight, bias = base.weight, base.bias
        if self.quantization_backend is not None:
            weight = self.get_base_weight
        elif has_offloaded_params(base):  # brought back for forward, and again for backward
            weight, bias = partial(onloaded, base, "weight"), onloaded(base, "bias")
        y = sparse_delta_linear(
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

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight, exactly as forward uses it, into the base layer.

        Args:
            safe_merge: refuse a result with NaN or inf, and leave the base untouched.
            adapter_names: adapters to merge, in this order; default: the active ones.

        Raises:
            ValueError: if ``safe_merge`` finds NaN or inf.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.dowser_values:
                continue
            where = self.positions(name)
            if where.numel() == 0:  # waits for its file
                continue
            weight = self.get_base_weight()
            merged = scatter_delta(weight, [where], [self.dowser_values[name].to(weight.device)])
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken; the base layer "
                    "is unchanged"
                )
            if self.quantization_backend is None:
                self._overwritten[name] = where, weight.reshape(-1).index_select(0, where)
                weight.copy_(merged)
            else:
                self._overwritten[name] = _quantised_state(self.get_base_layer())
                self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the original entries: the base layer is restored bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            original = self._overwritten.pop(name)
            if self.quantization_backend is None:
                where, entries = original
                weight = self.get_base_weight()
                restored = weight.clone(memory_format=torch.contiguous_format)
                restored.view(-1)[where.to(weight.device)] = entries.to(weight.device, weight.dtype)
                weight.copy_(restored)
            else:
                _restore_quantised(self.get_base_layer(), original)

    def _warn_once_about_base_hooks(self) -> None:
        base = self.get_base_layer()
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        if any(hooks) and not self._warned_about_base_hooks:
            self._warned_about_base_hooks = True
            warnings.warn(
                "A base layer adapted with Model-Dowser has forward or backward hooks, which are bypassed: the "
                "adapter reads its weight directly. Register them on the adapted layer instead (the same path, "
                "after the adapter has been added).",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        return "dowser." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def layers_with(model: nn.Module, adapter_name: str) -> Iterator[DowserLayer]:
    """The layers that have the adapter."""
    for module in model.modules():
        if isinstance(module, DowserLayer) and adapter_name in module.dowser_values:
            yield module


def _quantised_state(base: nn.Module) -> list[tuple[str, Any, dict[str, Any]]]:
    """The quantised weight (and bitsandbytes' 8-bit state) with their attributes, which a merge also changes."""
    parts = [(name, getattr(base, name)) for name in ("weight", "state") if getattr(base, name, None) is not None]
    return [(name, part, dict(vars(part))) for name, part in parts]


def _restore_quantised(base: nn.Module, original: list[tuple[str, Any, dict[str, Any]]]) -> None:
    for name, part, attributes in original:
        vars(part).clear()
        vars(part).update(attributes)
        setattr(base, name, part)
