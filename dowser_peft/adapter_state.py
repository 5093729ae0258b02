"""What is loaded into an adapter: checked as a whole before any of it is copied, undone if it is unusable.

And what is saved of one: refused if it is not all there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from dowser_peft import bitmask, column_ids
from dowser_peft.config import DowserConfig
from dowser_peft.tuner_layer import DowserLayer, layers_with


def check_adapter_state(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Check values and selections against each other and the model, before any of them is loaded.

    Raises:
        ValueError: naming the adapter, the module and what does not fit.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, DowserLayer)}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the base, which would go on answering with the old values: call "
            "unmerge_adapter() before loading others into its place"
        )
    parts = {name: ("dowser_values", layer.selection_name) for name, layer in layers.items()}
    known = {f"{name}.{part}.{adapter_name}" for name in layers for part in parts[name]}
    unknown = [key for key in state_dict if ".dowser_" in key and key not in known]
    if unknown:
        raise ValueError(
            f"adapter {adapter_name!r}: {len(unknown)} of {len(state_dict)} tensors in the file have no counterpart "
            f"in this model, first {unknown[0]!r}. The adapter belongs to another base model, or its configuration to "
            "another adapter"
        )
    for module_name, layer in layers.items():
        if adapter_name not in layer.dowser_values:
            continue
        values, selection = (state_dict.get(f"{module_name}.{part}.{adapter_name}") for part in parts[module_name])
        if values is None and selection is None:
            continue  # PEFT reports missing modules
        _check_layer(layer, adapter_name, values, selection, f"adapter {adapter_name!r}, module {module_name!r}")


def check_replacement(
    model: nn.Module, config: DowserConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """Check that what takes the place of an adapter that has its data replaces all of it, and nothing of the base.

    The configuration stays that of the adapter that was there, so tensors that only the file's own would place
    (``modules_to_save``, embeddings) would be written into the base. Equal ones change nothing. Biases are written
    there, as in all of PEFT, with a warning.

    Raises:
        ValueError: naming the adapter and the tensor or module.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, DowserLayer)
        and adapter_name in layer.dowser_values
        and not layer.is_waiting(adapter_name)
    }
    if not layers:
        return  # a new adapter: the configuration is the file's
    for name in layers:
        if f"{name}.dowser_values.{adapter_name}" not in state_dict:
            raise ValueError(
                f"adapter {adapter_name!r}, module {name!r}: the file has nothing for it, and would leave the old "
                "values among the new ones: load the file under a name of its own"
            )
    own = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter_name).values()
    }
    present = model.state_dict()
    biases = []
    for saved, tensor in state_dict.items():
        key = saved if saved in present else saved.removeprefix("base_model.model.")
        if ".dowser_" in key or key in own or _is_trained_bias(key, config, layers):
            continue
        there = present.get(key)
        if there is not None and (there.is_meta or _is_equal(there, tensor)):
            continue
        if key.endswith(".bias"):
            biases += [saved] if there is not None else []  # others are a second copy of one that is saved in full
            continue
        raise ValueError(
            f"adapter {adapter_name!r}: the file has {saved!r}, which the adapter that is there does not train: "
            f"bias={config.bias!r}, modules_to_save={config.modules_to_save}. It would be written into the base "
            "model, or be lost: load the file under a name of its own"
        )
    if biases:
        warnings.warn(
            f"adapter {adapter_name!r}: the file has {len(biases)} trained biases, such as {biases[0]!r}, but "
            f"bias={config.bias!r} here: they are written into the base model, for all adapters",
            stacklevel=2,
        )


def forget_other_base(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Drop the fingerprint of an adapter that another takes the place of, one of other weights than its own.

    Which base the file was made for is in its configuration, which PEFT does not read for an adapter that is there.
    """
    layers = [
        (n, x) for n, x in model.named_modules() if isinstance(x, DowserLayer) and adapter_name in x.dowser_values
    ]
    for name, layer in layers:
        selection = state_dict.get(f"{name}.{layer.selection_name}.{adapter_name}")
        if selection is None or layer.is_waiting(adapter_name):
            continue
        if not _is_equal(layer.selections[adapter_name], selection):
            for _, each in layers:
                each.base_fingerprint[adapter_name] = None
            return


def _is_trained_bias(key: str, config: DowserConfig, layers: Iterable[str]) -> bool:
    """Whether a key is that of a bias that the adapter trains."""
    if config.bias == "none" or not key.endswith(".bias"):
        return False
    return config.bias == "all" or any(key.startswith(f"{name}.") for name in layers)


def _is_equal(there: torch.Tensor, tensor: torch.Tensor) -> bool:
    return there.shape == tensor.shape and torch.equal(there, tensor.to(there.device, there.dtype))


def _check_layer(
    layer: DowserLayer, adapter_name: str, values: torch.Tensor | None, selection: torch.Tensor | None, where: str
) -> None:
    present, expected = layer.dowser_values[adapter_name], layer.selections[adapter_name]
    what = layer.selection_name.removeprefix("dowser_")
    if values is not None and (values.ndim != present.ndim or not values.is_floating_point()):
        raise ValueError(f"{where}: the file is damaged, its values are {_kind(values)}")
    if selection is not None and (selection.ndim != 1 or selection.dtype != expected.dtype):
        are = "are" if what == "columns" else "is"
        raise ValueError(f"{where}: the file is damaged, its {what} {are} {_kind(selection)}")
    if values is None or (selection is None and layer.is_waiting(adapter_name)):
        raise ValueError(f"{where}: the file has no {'values' if values is None else what} for it")
    if values.shape != present.shape:
        raise ValueError(
            f"{where}: size mismatch, the file has {_size(values)} trained weights, this model takes "
            f"{_size(present)}. The adapter belongs to another base model or another rho"
        )
    if selection is None:
        return
    is_empty = (_check_columns if layer.granularity == "column" else _check_mask)(layer, values, selection, where)
    if is_empty:
        warnings.warn(
            f"{where}: the file has {'no columns' if what == 'columns' else 'an empty mask'}, so this module stays as "
            "in the base",
            stacklevel=2,
        )


def _check_mask(layer: DowserLayer, values: torch.Tensor, mask: torch.Tensor, where: str) -> bool:
    """Check a mask, and whether it is empty."""
    size = values.numel()
    if mask.numel() != bitmask.packed_size(layer.numel):
        raise ValueError(
            f"{where}: size mismatch, the file has a mask of {mask.numel()} bytes, a layer of "
            f"{layer.out_features} x {layer.in_features} takes {bitmask.packed_size(layer.numel)}. The adapter "
            "belongs to another base model"
        )
    if bitmask.has_padding_set(mask, layer.numel):
        raise ValueError(f"{where}: the file is damaged, its mask marks weights past the last one")
    marked = bitmask.count(mask)
    if marked not in (0, size):
        raise ValueError(f"{where}: the file is damaged, its mask marks {marked} weights for {size} values")
    return marked == 0


def _check_columns(layer: DowserLayer, values: torch.Tensor, columns: torch.Tensor, where: str) -> bool:
    """Check ids of columns, and whether they are those of an adapter that was never loaded."""
    if columns.numel() != values.shape[1]:
        raise ValueError(
            f"{where}: the file is damaged, it has the ids of {columns.numel()} columns for values of "
            f"{values.shape[1]}"
        )
    if column_ids.are_none(columns):
        return True
    if (defect := column_ids.defect(columns, layer.in_features)) is not None:
        raise ValueError(f"{where}: the file is damaged, its columns {defect}")
    return False


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _size(values: torch.Tensor) -> str:
    return " x ".join(map(str, values.shape))


def check_whole(values: dict[str, torch.Tensor]) -> None:
    """Check, in the process that writes files, that values about to be saved are not those of ZeRO-3 before gathering.

    Raises:
        ValueError: if they are empty.
    """
    empty = [key for key, value in values.items() if value.numel() == 0]
    if empty and not (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
        raise ValueError(
            f"the trained values, first {empty[0]!r}, are partitioned over the processes by DeepSpeed ZeRO-3, so "
            "there is nothing to save here: use trainer.save_model(), or on every process "
            "model.save_pretrained(path, state_dict=accelerator.get_state_dict(engine), "
            "is_main_process=accelerator.is_main_process), with stage3_gather_16bit_weights_on_model_save set"
        )


def discard_waiting_adapter(model: nn.Module, config: DowserConfig, adapter_name: str) -> None:
    """Undo the injection of an adapter whose file turned out to be unusable."""
    tuner = next((module for module in model.modules() if isinstance(module, BaseTuner)), None)
    waiting = any(layer.is_waiting(adapter_name) for layer in layers_with(model, adapter_name))
    if tuner is None or not waiting:
        return
    if len(tuner.peft_config) > 1:
        tuner.delete_adapter(adapter_name)
        return
    base = tuner.unload()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in config._trainable_before)
