"""What is loaded into an adapter: checked as a whole before any of it is copied, undone if it is unusable."""

from __future__ import annotations

import warnings

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from dowser_peft import bitmask
from dowser_peft.config import DowserConfig
from dowser_peft.layer import DowserLayer, layers_with


def check_adapter_state(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Check values and masks against each other and the model, before any of them is loaded.

    Raises:
        ValueError: naming the adapter, the module and what does not fit.
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, DowserLayer)]
    known = {f"{name}.dowser_{part}.{adapter_name}" for name in layers for part in ("values", "mask")}
    unknown = [key for key in state_dict if ".dowser_" in key and key not in known]
    if unknown:
        raise ValueError(
            f"adapter {adapter_name!r}: {len(unknown)} of {len(state_dict)} tensors in the file have no counterpart "
            f"in this model, first {unknown[0]!r}. The adapter belongs to another base model"
        )
    for module_name, layer in model.named_modules():
        if not isinstance(layer, DowserLayer) or adapter_name not in layer.dowser_values:
            continue
        values = state_dict.get(f"{module_name}.dowser_values.{adapter_name}")
        mask = state_dict.get(f"{module_name}.dowser_mask.{adapter_name}")
        if values is None and mask is None:
            continue  # PEFT reports missing modules
        where = f"adapter {adapter_name!r}, module {module_name!r}"
        for what, tensor, fits in (
            ("values are", values, lambda t: t.ndim == 1 and t.is_floating_point()),
            ("mask is", mask, lambda t: t.ndim == 1 and t.dtype == torch.uint8),
        ):
            if tensor is not None and not fits(tensor):
                found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{where}: the file is damaged, its {what} {found}")
        if values is None or (mask is None and layer.is_waiting(adapter_name)):
            raise ValueError(f"{where}: the file has {'no values' if values is None else 'no mask'} for it")
        size, expected = values.numel(), layer.dowser_values[adapter_name].numel()
        if size != expected:
            raise ValueError(
                f"{where}: size mismatch, the file has {size} trained weights, this model takes {expected}. The "
                "adapter belongs to another base model or another rho"
            )
        if mask is None:
            continue
        if mask.numel() != bitmask.packed_size(layer.numel):
            raise ValueError(
                f"{where}: size mismatch, the file has a mask of {mask.numel()} bytes, a layer of "
                f"{layer.out_features} x {layer.in_features} takes {bitmask.packed_size(layer.numel)}. The adapter "
                "belongs to another base model"
            )
        if bitmask.has_padding_set(mask, layer.numel):
            raise ValueError(f"{where}: the file is damaged, its mask marks weights past the last one")
        marked = bitmask.count(mask)
        if marked == 0:
            warnings.warn(f"{where}: the file has an empty mask, so this module stays as in the base", stacklevel=2)
        elif marked != size:
            raise ValueError(f"{where}: the file is damaged, its mask marks {marked} weights for {size} values")


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
