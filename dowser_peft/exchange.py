"""Adapters in the format of PEFT's SHiRA, which loads without this package, and back.

SHiRA stores the same thing in another way: per module, values and the row and column of each.

    dowser_values [k] + dowser_mask, one bit a weight          5.25 bytes per value at rho = 0.1
    shira_weight  [r (in + out)] + shira_indices [2, ...]      12 bytes per value

It computes the same sums in the same precision, so outputs are equal bit for bit (of columns: equal to those of the
merged model). One rank ``r`` holds for all modules, and each must have r (in + out) values: what a module has fewer
is filled with zeros at its last position, which change nothing and which an import takes out again. PEFT's
Super-Tuning, the other sparse format, rounds every value to the dtype of the base and would not give these outputs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, ShiraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from dowser_peft import bitmask, column_ids
from dowser_peft.base_layer import is_at_hand, linear_shape, unwrapped
from dowser_peft.config import IMPORTANCE_NAMES, DowserConfig
from dowser_peft.derived import Size, derived_config
from dowser_peft.fingerprint import base_fingerprint
from dowser_peft.injection import exact_pattern
from dowser_peft.storage import check_safetensors, write_safetensors

_PREFIX = "base_model.model."
_VALUES, _MASK, _COLUMNS = ".dowser_values", ".dowser_mask", ".dowser_columns"
_WEIGHT, _INDICES = ".shira_weight", ".shira_indices"
_FINGERPRINT = "dowser_base_fingerprint"  # in the header of the exported file
_MASK_TYPE = "dowser-"  # SHiRA draws a mask of its own for "random" alone


def export_shira(adapter: str | os.PathLike[str], output: str | os.PathLike[str], base: nn.Module) -> int:
    """Write a saved Dowser adapter as a SHiRA adapter, which ``PeftModel.from_pretrained`` loads by itself.

    Args:
        adapter: its folder.
        output: folder to write to.
        base: the base model; only its shapes are read, so it may be on the meta device.

    Returns:
        How many weights the adapter trains.

    Raises:
        ValueError: if the adapter is damaged, of another base model, or cannot be expressed in SHiRA.
        TypeError: if a module is of a kind that SHiRA does not adapt.
    """
    config = _config(adapter, DowserConfig)
    if config.bias != "none":
        raise ValueError(
            f"an adapter with bias={config.bias!r} has no form in SHiRA, which trains no biases: merge it"
        )
    if config.target_parameters:
        raise ValueError("an adapter of fused experts has no form in SHiRA, which adapts linear layers: merge it")
    with _opened(adapter) as file:
        sizes = {name: torch.Size(file.get_slice(key).get_shape()).numel() for name, key in _keys(file, _VALUES)}
        shapes = _shapes(base, sizes)
        rank, largest = max((ceil(sizes[name] / sum(shapes[name])), name) for name in sizes)
        for name, (rows, columns) in shapes.items():
            if rank * (rows + columns) > rows * columns:
                raise ValueError(
                    f"SHiRA has one rank for all modules. {largest!r} needs {rank}, that is {rank * (rows + columns)} "
                    f"values in {name!r}, which has {rows * columns} weights. Merge the adapter instead"
                )
        tensors = {key: file.get_tensor(key) for key in _other_keys(file, _VALUES, _MASK, _COLUMNS)}
        for name, shape in shapes.items():
            values, positions = _dowser_entries(file, name, shape)
            padding = rank * sum(shape) - values.numel()
            positions = torch.cat([positions, positions[-1:].expand(padding)])
            tensors[f"{_PREFIX}{name}{_WEIGHT}"] = torch.cat([values, values.new_zeros(padding)])
            indices = torch.stack([positions // shape[1], positions % shape[1]])  # [2, r (in + out)]
            tensors[f"{_PREFIX}{name}{_INDICES}"] = indices.int()
    written = ShiraConfig(
        r=rank,
        mask_type=_MASK_TYPE + str(config.importance),  # type: ignore[arg-type]
        target_modules=exact_pattern(base, list(shapes)) or list(shapes),
        inference_mode=True,
        **_same_in_both(config),
    )
    metadata = {"format": "pt", _FINGERPRINT: config.base_fingerprint or ""}
    write_safetensors(Path(output) / SAFETENSORS_WEIGHTS_NAME, tensors, metadata)
    written.save_pretrained(str(output))
    return sum(sizes.values())


def import_shira(adapter: str | os.PathLike[str], output: str | os.PathLike[str], base: nn.Module) -> int:
    """Write a saved SHiRA adapter, exported or trained by PEFT, as a Dowser adapter.

    Args:
        adapter: its folder.
        output: folder to write to.
        base: the base model. Its weights are read only if :func:`tells_its_base` is False; else it may be on the
            meta device.

    Returns:
        How many weights the adapter trains.

    Raises:
        ValueError: if the adapter is damaged or of another base model, or the weights of ``base`` are needed and
            not there.
        TypeError: if a module is no plain linear layer.
    """
    config = _config(adapter, ShiraConfig)
    with _opened(adapter) as file:
        names = dict(_keys(file, _WEIGHT))
        shapes = _shapes(base, names)
        tensors = {key: file.get_tensor(key) for key in _other_keys(file, _WEIGHT, _INDICES)}
        sizes, dtypes = {}, set()
        for name, shape in shapes.items():
            values, mask = _shira_entries(file, name, shape)
            tensors[f"{_PREFIX}{name}{_VALUES}"], tensors[f"{_PREFIX}{name}{_MASK}"] = values, mask
            sizes[name] = Size(values.numel(), shape[0] * shape[1])
            dtypes.add(values.dtype)
        fingerprint = (file.metadata() or {}).get(_FINGERPRINT)
    modules = {name: base.get_submodule(name) for name in shapes}
    if not fingerprint and not all(map(is_at_hand, modules.values())):
        raise ValueError(
            "this adapter does not say which base weights it was trained on: pass a base with its weights"
        )
    importance = str(config.mask_type).removeprefix(_MASK_TYPE)
    like = DowserConfig(
        importance=importance if importance in IMPORTANCE_NAMES else "random",
        save_dtype="bfloat16" if dtypes == {torch.bfloat16} else "float32",
        inference_mode=True,
        **_same_in_both(config),
    )
    written = derived_config(base, like, sizes)
    written.base_fingerprint = fingerprint or base_fingerprint(modules)
    write_safetensors(Path(output) / SAFETENSORS_WEIGHTS_NAME, tensors, {"format": "pt"})
    written.save_pretrained(str(output))
    return sum(size.trained for size in sizes.values())


def tells_its_base(adapter: str | os.PathLike[str]) -> bool:
    """Whether a SHiRA adapter was exported by this package, and so says which base weights it was trained on."""
    with _opened(adapter) as file:
        return bool((file.metadata() or {}).get(_FINGERPRINT))


def _config(adapter: str | os.PathLike[str], wanted: type[PeftConfig]) -> Any:
    config = PeftConfig.from_pretrained(os.fspath(adapter))
    if not isinstance(config, wanted):
        method = str(config.peft_type).removeprefix("PeftType.")
        expected = wanted.__name__.removesuffix("Config")
        raise ValueError(f"{os.fspath(adapter)!r} is an adapter of the method {method}, not of {expected}")
    return config


@contextmanager
def _opened(adapter: str | os.PathLike[str]) -> Iterator[Any]:
    path = Path(adapter, SAFETENSORS_WEIGHTS_NAME)
    if not path.is_file():
        raise ValueError(f"{os.fspath(adapter)!r} has no {SAFETENSORS_WEIGHTS_NAME}: save the adapter again")
    check_safetensors(path, "adapter")
    with safe_open(path, framework="pt") as file:
        yield file


def _keys(file: Any, ending: str) -> list[tuple[str, str]]:
    """(module, key) of the tensors whose names end so.

    Raises:
        ValueError: if there are none.
    """
    keys = [key for key in file.keys() if key.endswith(ending)]  # noqa: SIM118  not a mapping
    found = [(key.removeprefix(_PREFIX).removesuffix(ending), key) for key in keys]
    if not found:
        raise ValueError(f"the adapter file has no tensor that ends in {ending!r}: it adapts no module")
    return found


def _other_keys(file: Any, *endings: str) -> list[str]:
    """Modules that are saved in full."""
    return [key for key in file.keys() if not key.endswith(endings)]  # noqa: SIM118  not a mapping


def _shapes(base: nn.Module, names: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of the adapted modules."""
    modules = dict(base.named_modules())
    shapes = {}
    for name in names:
        if name not in modules:
            raise ValueError(f"the adapter is not of this base model, which has no layer {name!r}")
        module = modules[name]
        if not isinstance(unwrapped(module), nn.Linear):
            raise TypeError(
                f"module {name!r} is a {type(module).__name__}: SHiRA adapts torch.nn.Linear alone. Merge the adapter "
                "instead"
            )
        shapes[name] = linear_shape(module)
    return shapes


def _same_in_both(config: Any) -> dict[str, Any]:
    same = ("base_model_name_or_path", "revision", "task_type", "modules_to_save")
    return {name: getattr(config, name) for name in same}


def _dowser_entries(file: Any, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[k]`` of a module and their flat positions, int64 ``[k]``."""
    rows, columns = shape
    values = file.get_tensor(f"{_PREFIX}{name}{_VALUES}")
    keys = set(file.keys())
    if f"{_PREFIX}{name}{_MASK}" in keys:
        mask = file.get_tensor(f"{_PREFIX}{name}{_MASK}")
        fits = values.ndim == 1 and mask.numel() == bitmask.packed_size(rows * columns)
        if fits and not bitmask.has_padding_set(mask, rows * columns) and bitmask.count(mask) == values.numel():
            return values, bitmask.positions(mask, rows * columns).long()
    elif f"{_PREFIX}{name}{_COLUMNS}" in keys:
        chosen = file.get_tensor(f"{_PREFIX}{name}{_COLUMNS}")
        if values.shape == (rows, chosen.numel()) and column_ids.defect(chosen, columns) is None:
            starts = torch.arange(rows)[:, None] * columns
            return values.reshape(-1), (starts + chosen.long()).view(-1)
    raise ValueError(
        f"module {name!r}: the file is damaged, or belongs to another base model. It has values of shape "
        f"{list(values.shape)}, and no mask or columns that fit them and a layer of {rows} x {columns} weights"
    )


def _shira_entries(file: Any, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[k]`` of a module, in the order of their positions, and its packed mask."""
    rows, columns = shape
    weight = file.get_tensor(f"{_PREFIX}{name}{_WEIGHT}")
    if f"{_PREFIX}{name}{_INDICES}" not in file.keys():  # noqa: SIM118  not a mapping
        raise ValueError(f"module {name!r}: the file is damaged, it has no indices for it")
    indices = file.get_tensor(f"{_PREFIX}{name}{_INDICES}").long()  # floats if saved on Windows
    if indices.shape != (2, weight.numel()):
        raise ValueError(
            f"module {name!r}: the file is damaged, it has indices of shape {list(indices.shape)} for "
            f"{weight.numel()} values"
        )
    limits = torch.tensor([[rows], [columns]])
    if bool(((indices < 0) | (indices >= limits)).any()):
        raise ValueError(
            f"module {name!r}: an index lies outside of its {rows} x {columns} weights. The adapter belongs to "
            "another base model"
        )
    positions, slots = (indices[0] * columns + indices[1]).unique(return_inverse=True)
    wide = torch.zeros(positions.numel(), dtype=torch.promote_types(weight.dtype, torch.float32))
    values = wide.index_add_(0, slots, weight.to(wide.dtype))  # zeros that filled up, or positions given twice
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[positions] = True
    return values.bfloat16() if weight.dtype == torch.bfloat16 else values, bitmask.pack(mask)
