"""What is in an adapter: per module how much trains, how far it moved, and where the mask lies.

Only the adapter's file is read, one module at a time. The shape of a layer is not in it, so rows and columns
of the mask are known only with the configuration of the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from dowser_peft import bitmask
from dowser_peft.base_layer import is_linear, is_transposed, linear_shape
from dowser_peft.cli.models import ADAPTER_WEIGHTS
from dowser_peft.cli.naming import Place, in_model_order, places

FULLEST = 0.1  # concentration: the share of the mask in the fullest tenth of the rows, and of the columns

_PREFIX = "base_model.model."
_VALUES, _MASK = ".dowser_values", ".dowser_mask"


@dataclass(frozen=True)
class AdapterRow:
    """One adapted module.

    Args:
        name: full name of the module in the base model.
        place: its layer and short name.
        shape: (out, in), or None if the base model is not at hand.
        trained: how many weights train.
        total: how many there are; without ``shape`` rounded up to a multiple of eight.
        l2: root of the sum of the squared deltas.
        max_abs: largest absolute delta.
        in_fullest_rows: share of the trained weights in the fullest tenth of the outputs; 0.1 is even.
        in_fullest_columns: the same of the inputs.
    """

    name: str
    place: Place
    shape: tuple[int, int] | None
    trained: int
    total: int
    l2: float
    max_abs: float
    in_fullest_rows: float | None
    in_fullest_columns: float | None

    @property
    def rho(self) -> float:
        """The share of the weights that trains."""
        return self.trained / self.total

    @property
    def rms(self) -> float:
        """Root mean square of the deltas."""
        return self.l2 / self.trained**0.5


def module_names(folder: Path) -> list[str]:
    """The adapted modules in an adapter's file, in the order of their layers.

    Raises:
        ValueError: if a mask or the values of a module are missing.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        keys = set(file.keys())
    names = {key.removeprefix(_PREFIX).removesuffix(_VALUES) for key in keys if key.endswith(_VALUES)}
    masks = {key.removeprefix(_PREFIX).removesuffix(_MASK) for key in keys if key.endswith(_MASK)}
    if odd := sorted(names ^ masks):
        missing = "mask" if odd[0] in names else "values"
        raise ValueError(f"the adapter in {str(folder)!r} is damaged: it has no {missing} for {odd[0]!r}")
    if not names:
        raise ValueError(f"the adapter in {str(folder)!r} adapts no module: its file holds no Dowser values")
    return in_model_order(names)


def num_other_weights(folder: Path) -> int:
    """Weights saved in full beside the sparse deltas: modules_to_save, embeddings, biases."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        others = [key for key in file.keys() if not key.endswith((_VALUES, _MASK))]  # noqa: SIM118  not a mapping
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
    modules = dict(base.named_modules()) if base is not None else {}
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        for name in names:
            values = file.get_tensor(f"{_PREFIX}{name}{_VALUES}").float()
            mask = file.get_tensor(f"{_PREFIX}{name}{_MASK}")
            if (marked := bitmask.count(mask)) != values.numel():
                raise ValueError(
                    f"the adapter in {str(folder)!r} is damaged: the mask of {name!r} marks {marked} weights for "
                    f"{values.numel()} values"
                )
            shape, rows, columns = None, None, None
            if base is not None:
                module = modules.get(name)
                if module is None or not is_linear(module):
                    raise ValueError(f"the adapter is not of this base model, which has no linear layer {name!r}")
                shape = linear_shape(module)
                rows, columns = _concentration(mask, shape, is_transposed(module), name)
            yield AdapterRow(
                name=name,
                place=where[name],
                shape=shape,
                trained=values.numel(),
                total=shape[0] * shape[1] if shape else mask.numel() * 8,
                l2=float(torch.linalg.vector_norm(values)),
                max_abs=float(values.abs().max()) if values.numel() else 0.0,
                in_fullest_rows=rows,
                in_fullest_columns=columns,
            )


def _concentration(mask: torch.Tensor, shape: tuple[int, int], transposed: bool, name: str) -> tuple[float, float]:
    """Shares of the mask in the fullest tenth of the rows (outputs) and of the columns (inputs)."""
    out_features, in_features = shape
    if mask.numel() != bitmask.packed_size(out_features * in_features):
        raise ValueError(
            f"the adapter is not of this base model: its mask of {name!r} has {mask.numel()} bytes, a layer of "
            f"{out_features} x {in_features} takes {bitmask.packed_size(out_features * in_features)}"
        )
    stored = (in_features, out_features) if transposed else shape
    marked = bitmask.unpack(mask, out_features * in_features).view(stored)
    if transposed:
        marked = marked.T
    return _share_of_fullest(marked.sum(1)), _share_of_fullest(marked.sum(0))


def _share_of_fullest(counts: torch.Tensor) -> float:
    fullest = counts.topk(max(1, round(FULLEST * counts.numel()))).values
    return int(fullest.sum()) / max(1, int(counts.sum()))
