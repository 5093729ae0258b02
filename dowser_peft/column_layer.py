"""ColumnLinear: a frozen linear layer plus trainable deltas of whole input columns, one per adapter.

dowser_values.<adapter>    Parameter [out, k], float32: the delta V, zero at the start
dowser_columns.<adapter>   persistent int32 buffer [k]: ids of the columns, ascending
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict

from dowser_peft import column_ids
from dowser_peft.base_layer import is_transposed
from dowser_peft.column_delta import add_column_delta
from dowser_peft.partitioned import gather_for
from dowser_peft.scoring import num_trainable
from dowser_peft.tuner_layer import DowserLayer


class _Checked(NamedTuple):
    columns: weakref.ref[torch.Tensor]
    version: int | None
    is_waiting: bool


class ColumnLinear(DowserLayer):
    """A Dowser adapter on whole input columns of any layer that maps ``in_features`` to ``out_features``.

    ``y = base(x) + x[..., c] V^T``; see :mod:`dowser_peft.column_delta`. The base layer is really called: its
    hooks run, and a quantised one computes as it does without an adapter. A merge rounds ``W[:, c] + V`` to the
    dtype of the weight, so merged and unmerged outputs agree within rounding, not bit for bit.
    """

    other_param_names: tuple[str, ...] = ("dowser_columns",)
    granularity = "column"
    selection_name = "dowser_columns"
    dowser_columns: BufferDict
    # adapter -> what was found out about its ids, which takes a transfer from the GPU
    _checked: dict[str, _Checked]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._checked = {}

    def values_shape(self, rho: float) -> tuple[int, ...]:
        return self.out_features, num_trainable(self.in_features, rho)

    def empty_selection(self, rho: float) -> torch.Tensor:
        return column_ids.none_yet(num_trainable(self.in_features, rho))

    @torch.compiler.assume_constant_result
    def is_waiting(self, adapter_name: str) -> bool:
        """Whether the adapter was allocated for a file that has not been loaded yet.

        Raises:
            RuntimeError: if its columns are not those of this layer.
        """
        columns = self.dowser_columns[adapter_name]
        version = None if columns.is_inference() else columns._version  # counts writes in place
        cached = self._checked.get(adapter_name)
        if cached is None or version is None or cached.columns() is not columns or cached.version != version:
            is_waiting = column_ids.are_none(columns)
            defect = None if is_waiting else column_ids.defect(columns, self.in_features)
            if defect is not None:
                raise RuntimeError(
                    f"adapter {adapter_name!r}: its columns {defect}. Load the adapter again from its file"
                )
            cached = _Checked(weakref.ref(columns), version, is_waiting)
            self._checked[adapter_name] = cached
        return cached.is_waiting

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._checked.pop(adapter_name, None)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        values = self.dowser_values[adapter]
        delta = values.new_zeros(self.out_features, self.in_features)
        if not self.is_waiting(adapter):
            delta = delta.index_copy(1, self.dowser_columns[adapter].long(), values)
        return delta.T if is_transposed(self.get_base_layer()) else delta

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name not in self.dowser_values:
                continue
            if self.is_waiting(name):
                self._check_may_train(name)
                continue
            if not torch.compiler.is_compiling():
                gather_for(self, [self.dowser_values[name]])
            y = add_column_delta(y, x, self.dowser_columns[name], self.dowser_values[name])
        return y

    def union(self, adapter_names: Sequence[str]) -> torch.Tensor:
        return torch.cat([self.dowser_columns[name] for name in adapter_names]).unique()

    def spread(self, values: torch.Tensor, adapter_name: str, selection: torch.Tensor) -> torch.Tensor:
        own = torch.isin(selection, self.dowser_columns[adapter_name])
        result = values.new_zeros(self.out_features, selection.numel())
        result[:, own.to(values.device)] = values
        return result

    def _effective_weight(self, weight: torch.Tensor, adapter_name: str) -> torch.Tensor:
        columns, original = self._selected_entries(weight, adapter_name)
        effective = weight.clone()
        self._write_entries(effective, columns, self._merged_entries(original, adapter_name))
        return effective

    def _selected_entries(self, weight: torch.Tensor, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        columns = self.dowser_columns[adapter_name].to(weight.device, torch.long)
        return columns, weight.index_select(self._input_dim, columns)

    def _merged_entries(self, entries: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The sum is taken in float32 (float64 for a float64 weight) and rounded once."""
        values = self.dowser_values[adapter_name].detach().to(entries.device)
        wide = torch.promote_types(torch.promote_types(values.dtype, entries.dtype), torch.float32)
        delta = values.T if is_transposed(self.get_base_layer()) else values
        return (entries.to(wide) + delta).to(entries.dtype)

    def _write_entries(self, weight: torch.Tensor, where: torch.Tensor, entries: torch.Tensor) -> None:
        weight.index_copy_(self._input_dim, where.to(weight.device), entries.to(weight.device, weight.dtype))

    @property
    def _input_dim(self) -> int:
        """The dimension of the stored weight that counts inputs."""
        return 0 if is_transposed(self.get_base_layer()) else 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": {}}  # derived, and its weak references do not pickle
