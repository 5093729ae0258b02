"""What is in an adapter: per module how much trains, how far it moved, and where.

Only the adapter's file is read, one module at a time. The shape of a layer is not in it, so rows and columns
of the mask are known only with the configuration of the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from dowser_peft import bitmask, column_ids
from dowser_peft.base_layer import is_transposed, linear_shape, maps_features
from dowser_peft.cli.models import ADAPTER_WEIGHTS
from dowser_peft.cli.naming import Place, in_model_order, places
from dowser_peft.fused_experts import FusedWeight, fused_weights

FULLEST = 0.1  # concentration: the share of the mask in the fullest tenth of the rows, and of the columns

_PREFIX = "base_model.model."
_VALUES, _MASK, _COLUMNS = ".dowser_values", ".dowser_mask", ".dowser_columns"


@dataclass(frozen=True)
class AdapterRow:
    """One adapted module.

    Args:
        name: full name of the module in the base model.
        place: its layer and short name.
        shape: (out, in), of fused experts with the outputs of all, or None if the base model is not at hand.
        trained: how many weights train.
        columns: how many whole input columns that is; None if single weights train.
        total: how many weights there are; without ``shape`` rounded up to a multiple of eight, or, if columns
            train, not known.
        l2: root of the sum of the squared deltas.
        max_abs: largest absolute delta.
        in_fullest_rows: share of the trained weights in the fullest tenth of the outputs; 0.1 is even. None
            without ``shape``, and of columns, which hold all outputs.
        in_fullest_columns: the same of the inputs.
    """

    name: str
    place: Place
    shape: tuple[int, int] | None
    trained: int
    columns: int | None
    total: int | None
    l2: float
    max_abs: float
    in_fullest_rows: float | None
    in_fullest_columns: float | None

    @property
    def rho(self) -> float | None:
        """The share of the weights that trains."""
        return None if self.total is None else self.trained / self.total

    @property
    def rms(self) -> float:
        """Root mean square of the deltas."""
        return self.l2 / self.trained**0.5


def module_names(folder: Path) -> list[str]:
    """The adapted modules in an adapter's file, in the order of their layers.

    Raises:
        ValueError: if a mask, the ids of columns, or the values of a module are missing.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        keys = set(file.keys())
    names = {key.removeprefix(_PREFIX).removesuffix(_VALUES) for key in keys if key.endswith(_VALUES)}
    selections = {
        key.removeprefix(_PREFIX).removesuffix(end) for end in (_MASK, _COLUMNS) for key in keys if key.endswith(end)
    }
    if odd := sorted(names ^ selections):
        has_columns = any(key.endswith(_COLUMNS) for key in keys)
        missing = "values" if odd[0] in selections else "columns" if has_columns else "mask"
        raise ValueError(f"the adapter in {str(folder)!r} is damaged: it has no {missing} for {odd[0]!r}")
    if not names:
        raise ValueError(f"the adapter in {str(folder)!r} adapts no module: its file holds no Dowser values")
    return in_model_order(names)


def num_other_weights(folder: Path) -> int:
    """Weights saved in full beside the sparse deltas: modules_to_save, embeddings, biases."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        others = [key for key in file.keys() if not key.endswith((_VALUES, _MASK, _COLUMNS))]  # noqa: SIM118  not a mapping
        return sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in others)


def adapter_rows(folder: Path, base: nn.Module | None) -> Iterator[AdapterRow]:
    """One row a module.

    Args:
        folder: of the adapter.
        base: the base model, which may be on the meta device: only shapes are read.

    Raises:
        ValueError: if the file is damaged, or the adapter is not of this base model.
    """
    names = module_names(folder)
    where = places(names)
    modules: dict[str, Any] = {}
    if base is not None:
        modules = dict(base.named_modules()) | dict(fused_weights(base))
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        keys = set(file.keys())
        for name in names:
            values = file.get_tensor(f"{_PREFIX}{name}{_VALUES}").float()
            shape, rows, columns = None, None, None
            if base is not None:
                module = modules.get(name)
                if module is None or not maps_features(module):
                    raise ValueError(f"the adapter is not of this base model, which has no linear layer {name!r}")
                shape = _shape(module)
            if f"{_PREFIX}{name}{_MASK}" in keys:
                num_columns = None
                mask = file.get_tensor(f"{_PREFIX}{name}{_MASK}")
                if (marked := bitmask.count(mask)) != values.numel():
                    raise ValueError(
                        f"the adapter in {str(folder)!r} is damaged: the mask of {name!r} marks {marked} weights for "
                        f"{values.numel()} values"
                    )
                if shape is not None:
                    rows, columns = _concentration(mask, shape, modules[name], name)
                total = mask.numel() * 8
            else:
                num_columns = _num_columns(file.get_tensor(f"{_PREFIX}{name}{_COLUMNS}"), values, shape, folder, name)
                total = None
            yield AdapterRow(
                name=name,
                place=where[name],
                shape=shape,
                trained=values.numel(),
                columns=num_columns,
                total=shape[0] * shape[1] if shape else total,
                l2=float(torch.linalg.vector_norm(values)),
                max_abs=float(values.abs().max()) if values.numel() else 0.0,
                in_fullest_rows=rows,
                in_fullest_columns=columns,
            )


def _num_columns(
    columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int] | None, folder: Path, name: str
) -> int:
    """How many columns train, checked against the values and, if it is known, the shape of the layer."""
    defect = column_ids.defect(columns, shape[1] if shape else None)
    if defect is None and (values.ndim != 2 or values.shape[1] != columns.numel()):
        defect = f"are {columns.numel()} for values of shape {list(values.shape)}"
    if defect is not None:
        raise ValueError(f"the adapter in {str(folder)!r} is damaged: the columns of {name!r} {defect}")
    if shape is not None and values.shape[0] != shape[0]:
        raise ValueError(
            f"the adapter is not of this base model: its values of {name!r} have {values.shape[0]} outputs, the layer "
            f"has {shape[0]}"
        )
    return columns.numel()


def _shape(module: Any) -> tuple[int, int]:
    """(out, in) of a layer, the outputs of all fused experts counted."""
    if isinstance(module, FusedWeight):
        out_features, in_features = module.expert_shape
        return module.num_experts * out_features, in_features
    return linear_shape(module)


def _concentration(mask: torch.Tensor, shape: tuple[int, int], module: Any, name: str) -> tuple[float, float]:
    """Shares of the mask in the fullest tenth of the rows (outputs) and of the columns (inputs)."""
    out_features, in_features = shape
    if mask.numel() != bitmask.packed_size(out_features * in_features):
        raise ValueError(
            f"the adapter is not of this base model: its mask of {name!r} has {mask.numel()} bytes, a layer of "
            f"{out_features} x {in_features} takes {bitmask.packed_size(out_features * in_features)}"
        )
    marked = bitmask.unpack(mask, out_features * in_features)
    if isinstance(module, FusedWeight):
        each = marked.view(module.num_experts, module.rows, module.columns)
        marked = (each.transpose(1, 2) if module.is_transposed else each).reshape(shape)
    else:
        marked = marked.view(shape[::-1]).T if is_transposed(module) else marked.view(shape)
    return _share_of_fullest(marked.sum(1)), _share_of_fullest(marked.sum(0))


def _share_of_fullest(counts: torch.Tensor) -> float:
    fullest = counts.topk(max(1, round(FULLEST * counts.numel()))).values
    return int(fullest.sum()) / max(1, int(counts.sum()))
