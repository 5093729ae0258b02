"""DowserLayer: a frozen linear layer plus trainable deltas on a part of its weight, one per adapter.

What is kept per adapter:

    dowser_values.<adapter>       Parameter, float32: the delta, zero at the start
    dowser_<selection>.<adapter>  persistent buffer: where the delta is, chosen once by importance

Two selections share all of this and differ in how they compute: single weights (:class:`dowser_peft.layer.Linear`,
a mask of one bit per weight) and whole input columns (:class:`dowser_peft.column_layer.ColumnLinear`, their ids).
The selection is the only stored truth of where. An adapter with an empty one is waiting for its file: it computes
nothing and must not train.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.integrations import is_fsdp_enabled

from dowser_peft.base_layer import FLOAT_DTYPES, has_readable_weight, linear_shape, unpack_4bit
from dowser_peft.partitioned import gathered


class Selections(BufferDict):
    """Where each adapter of a layer is.

    Persistent; except where FSDP is to send the base from the first rank (``fsdp_cpu_ram_efficient_loading``), because
    accelerate then takes every persistent tensor for a sharded parameter. All ranks have the selection already, and
    saving adds it. Loading writes it in either case.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        hidden = self._non_persistent_buffers_set
        self._non_persistent_buffers_set = {name for name in hidden if f"{prefix}{name}" not in state_dict}
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            self._non_persistent_buffers_set = hidden


class DowserLayer(nn.Module, BaseTunerLayer):
    """State of the adapters of one linear layer, and how they are merged into it.

    Args:
        base_layer: the frozen layer.
        adapter_name: name of the first adapter.
        rho: fraction of the weights that train.
        where: its selection, or None for an adapter whose file is about to be loaded.
        init_weights: start at zero (True) or at random values (False).
        inference_mode: whether the values are frozen.
    """

    adapter_layer_names: tuple[str, ...] = ("dowser_values",)
    granularity: ClassVar[str]  # of the configuration: what is selected
    selection_name: ClassVar[str]  # of the buffers that say where: "dowser_<selection>"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        rho: float,
        where: torch.Tensor | None,
        init_weights: bool = True,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dowser_values = nn.ParameterDict()
        setattr(self, self.selection_name, Selections(persistent=not is_fsdp_enabled()))
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self._disable_adapters = False
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting sets it
        self.merged_adapters: list[str] = []
        self.base_fingerprint: dict[str, str | None] = {}  # adapter -> base weights it was chosen for
        # adapter -> where and what its merge overwrote, to restore it bit for bit
        self._overwritten: dict[str, Any] = {}
        self._num_writes = 0  # of merges and unmerges

        base: Any = self.get_base_layer()
        self.out_features, self.in_features = linear_shape(base)
        if hasattr(base, "support_avx512bf16_for_cpu"):
            base.support_avx512bf16_for_cpu = False  # bitsandbytes must not rearrange what we read
            unpack_4bit(base)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rho, where, init_weights, inference_mode)

    @property
    def numel(self) -> int:
        """Weights of the base layer."""
        return self.in_features * self.out_features

    @property
    def selections(self) -> Selections:
        """Where each adapter is."""
        return getattr(self, self.selection_name)

    @abstractmethod
    def values_shape(self, rho: float) -> tuple[int, ...]:
        """Shape of the values of an adapter that trains the fraction ``rho``."""

    @abstractmethod
    def empty_selection(self, rho: float) -> torch.Tensor:
        """The selection of an adapter that waits for its file, in the shape of the one in the file."""

    @abstractmethod
    def is_waiting(self, adapter_name: str) -> bool:
        """Whether the adapter was allocated for a file that has not been loaded yet."""

    @abstractmethod
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Dense delta of an adapter, in the shape of the stored weight and the dtype of the values."""

    @abstractmethod
    def _effective_weight(self, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """A copy of the stored weight with the delta of an adapter added."""

    @abstractmethod
    def _selected_entries(self, weight: torch.Tensor, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the delta of an adapter is, and copies of the entries of the stored weight there."""

    @abstractmethod
    def _merged_entries(self, entries: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """What ``_selected_entries`` returned with the delta of the adapter added: entries of the effective weight."""

    @abstractmethod
    def _write_entries(self, weight: torch.Tensor, where: torch.Tensor, entries: torch.Tensor) -> None:
        """Write entries to where ``_selected_entries`` found them."""

    @abstractmethod
    def union(self, adapter_names: Sequence[str]) -> torch.Tensor:
        """The selection of all that any of these adapters selects."""

    @abstractmethod
    def spread(self, values: torch.Tensor, adapter_name: str, selection: torch.Tensor) -> torch.Tensor:
        """``values``, which lie where an adapter is, over a selection that holds its own: zeros elsewhere."""

    def update_layer(
        self,
        adapter_name: str,
        rho: float,
        where: torch.Tensor | None,
        init_weights: bool,
        inference_mode: bool = False,
    ) -> None:
        """Allocate an adapter; arguments as of the class."""
        shape = self.values_shape(rho)
        values = torch.zeros(shape) if init_weights else 0.1 * torch.randn(shape)
        self.dowser_values[adapter_name] = nn.Parameter(values)
        self.selections[adapter_name] = self.empty_selection(rho) if where is None else where
        self._move_new_adapter(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        """As PEFT finds them, for any kind of base layer; the dtype only if it is one to train in."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            device = next((tensor.device for tensor in chain(base_layer.parameters(), base_layer.buffers())), None)
        return device, dtype if dtype in FLOAT_DTYPES else None

    def _move_new_adapter(self, adapter_name: str) -> None:
        if self.dowser_values[adapter_name].device.type == "meta":  # low_cpu_mem_usage: the file brings the data
            return
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        values = self.dowser_values[adapter_name]
        if device is not None and device.type == "meta":  # an offloaded base: where it runs
            hook = getattr(self.get_base_layer(), "_hf_hook", None)
            device = torch.device(getattr(hook, "execution_device", None) or values.device)
        self.dowser_values[adapter_name] = nn.Parameter(values.detach().to(device, dtype or values.dtype))
        self.selections[adapter_name] = self.selections[adapter_name].to(device)

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
        self.selections[adapter_name] = self.selections[adapter_name].to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.base_fingerprint.pop(adapter_name, None)

    def cast_to_base_dtype(self, adapter_name: str) -> None:
        """Give the values the dtype of the base weight, unless that is no dtype to train in."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        values = self.dowser_values[adapter_name]
        if dtype is not None and values.dtype != dtype:
            self.dowser_values[adapter_name] = nn.Parameter(values.detach().to(dtype), values.requires_grad)

    def _check_may_train(self, adapter_name: str) -> None:
        """Refuse gradients for an adapter that waits for its file.

        Raises:
            RuntimeError: if its values would get one.
        """
        if torch.is_grad_enabled() and self.dowser_values[adapter_name].requires_grad:
            parts = {"element": "mask has", "column": "columns have"}[self.granularity]
            raise RuntimeError(
                f"adapter {adapter_name!r} cannot train: in some layer its {parts} not been loaded. Either it was "
                "created from the configuration of a saved adapter or with low_cpu_mem_usage (to train a "
                "saved one use PeftModel.from_pretrained(base, path, is_trainable=True), to start a new one "
                "a fresh DowserConfig), or its file lacks a module that this model has"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the effective weight into the base layer.

        Args:
            safe_merge: refuse a result with NaN or inf, and leave the base untouched.
            adapter_names: adapters to merge, in this order; default: the active ones.

        Raises:
            ValueError: if the weight cannot be read, or ``safe_merge`` finds NaN or inf.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.dowser_values:
                continue
            with gathered([self.dowser_values[name]]):
                if self.is_waiting(name):
                    continue
                self.check_mergeable()
                with self._writable_weight():
                    self._merge(name, safe_merge)
            self.merged_adapters.append(name)

    def get_base_weight(self) -> torch.Tensor:
        """The weight of the base layer, dequantised if need be; autograd notices what is written into it."""
        if self.quantization_backend is None:
            weight: Any = self.get_base_layer().weight
            return weight.detach()
        return super().get_base_weight()

    def _until_written(self, read: Callable[[], Any]) -> Callable[[], torch.Tensor]:
        """``read``, for forward and backward: it refuses once a merge or unmerge has come in between."""
        if torch.compiler.is_compiling():
            return read
        writes = self._num_writes

        def read_again() -> torch.Tensor:
            if self._num_writes != writes:
                raise RuntimeError(
                    "an adapter was merged or unmerged between the forward and the backward pass, whose gradients "
                    "would be wrong: call backward() first"
                )
            return read()

        return read_again

    def _merge(self, name: str, safe_merge: bool) -> None:
        weight = self.get_base_weight()
        if self.quantization_backend is None:  # only the entries that change are read and written
            where, original = self._selected_entries(weight, name)
            merged = self._merged_entries(original, name)
        else:
            merged = self._effective_weight(weight, name)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken; this base "
                "layer is unchanged"
            )
        self._num_writes += 1
        if self.quantization_backend is None:
            self._overwritten[name] = where, original
            self._write_entries(weight, where, merged)
        else:
            self._overwritten[name] = self.base_layer, _quantised_state(self.get_base_layer())
            before: Any = self.get_base_layer()
            self.set_base_weight(merged)
            self.get_base_layer().bias = before.bias  # PEFT replaces a layer of HQQ by one without

    def _writable_weight(self) -> AbstractContextManager[None]:
        """While the block runs, all processes have the base weight and write it."""
        return gathered([getattr(self.get_base_layer(), "weight", None)], modified=True)

    def unmerge(self) -> None:
        """Put back the original entries: the base layer is restored bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.unmerge_to(0)

    def unmerge_to(self, count: int) -> None:
        """Unmerge all but the first ``count`` that were merged."""
        while len(self.merged_adapters) > count:
            name = self.merged_adapters.pop()
            original = self._overwritten.pop(name)
            self._num_writes += 1
            if self.quantization_backend is None:
                with self._writable_weight():
                    self._write_entries(self.get_base_weight(), *original)
            else:
                self.base_layer, state = original
                _restore_quantised(self.get_base_layer(), state)

    def check_mergeable(self) -> None:
        """Refuse a base layer whose weight cannot be read.

        Raises:
            ValueError: naming the kind of layer.
        """
        base = self.get_base_layer()
        if not has_readable_weight(base):
            raise ValueError(
                f"cannot merge into a {type(base).__name__}: its weight is not a matrix of ordinary floats and cannot "
                "be dequantised. Load the adapter on the unquantised base model and merge there"
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # a delta on single weights or many columns: its low-rank approximation is not the adapter

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
