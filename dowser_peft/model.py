"""DowserModel: which modules are adapted, and with which masks.

All paths that create an adapter go through ``inject_adapter``: ``get_peft_model``, ``add_adapter``,
``load_adapter``, ``from_pretrained`` and transformers' own methods. There a fresh adapter is probed, scored
and selected; an adapter that is being loaded gets room for its values and mask, and never probes.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import get_quantization_kwargs
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn

from dowser_peft import bitmask
from dowser_peft.base_layer import (
    is_at_hand,
    is_linear,
    is_plain,
    is_transposed,
    linear_shape,
    quantisation_of,
    unwrapped,
)
from dowser_peft.config import DowserConfig
from dowser_peft.importance import base_fingerprint, differs_from, select_masks
from dowser_peft.layer import DowserLayer, Linear
from dowser_peft.targets import default_targets, last_layers


class DowserModel(BaseTuner):
    """A model with Model-Dowser adapters (arXiv 2602.04509); made by ``get_peft_model``.

    Args:
        model: the model to adapt, modified in place.
        peft_config: a :class:`DowserConfig`, or ``{adapter_name: config}``.
        adapter_name: name of the adapter.
    """

    prefix: str = "dowser_"
    tuner_layer_cls = DowserLayer
    target_module_mapping: dict[str, list[str]] = {}  # default targets are found from structure

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add the adapter ``adapter_name``, probing and selecting its masks if it is new.

        It is being loaded, and must not probe, if its configuration was read back from a saved adapter, if it
        is for inference only, if its parameters are created on the meta device, or if it is injected by the
        keys of a state dict.
        """
        config: Any = self.peft_config[adapter_name]
        _check_adapter_name(adapter_name)
        as_given = {name: getattr(config, name) for name in ("target_modules", "fan_in_fan_out")}
        by_default = config.target_modules == config._default_targets  # None, or resolved for an earlier model
        trainable: set[str] | None = None
        is_fresh = not (
            config.is_saved_adapter
            or config.inference_mode
            or low_cpu_mem_usage
            or _creates_meta_parameters()
            or state_dict is not None
        )
        try:
            self._check_new_adapter_config(config)
            names = _resolve_targets(model, config)
            _check_adaptable(model, names, is_fresh)
            _settle_config(model, config, names)
            fingerprint = config.base_fingerprint
            if is_fresh and names:
                _unmerge_all(model)
                config._masks = select_masks(model, config, names)
                fingerprint = base_fingerprint({name: model.get_submodule(name) for name in names})
            elif config.is_saved_adapter:
                _warn_about_other_base(model, config, names)
            config._trainable_before = trainable = {n for n, p in model.named_parameters() if p.requires_grad}
            BaseTuner.inject_adapter(
                self,
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        except BaseException as error:
            if trainable is not None:
                _undo_injection(model, adapter_name, trainable)
            del self.peft_config[adapter_name]
            vars(config).update(as_given)
            if isinstance(error, NoMatchingPeftModuleError):
                raise NoMatchingPeftModuleError(f"{error}{_near_misses(model, config.target_modules)}") from error
            raise
        finally:
            config._masks = {}
        if by_default:
            config._default_targets = config.target_modules
        for layer in _layers_with(model, adapter_name):
            layer.base_fingerprint[adapter_name] = fingerprint

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # asked for explicitly: values in the dtype of the base, however loaded
            for layer in _layers_with(self.model, adapter_name):
                layer.cast_to_base_dtype(adapter_name)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # targets are resolved before injection

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if peft_config._masks and current_key not in peft_config._masks:
            raise RuntimeError(f"no mask was selected for module {current_key!r}, which PEFT wants to adapt")
        options: dict[str, Any] = {
            "rho": peft_config.rho_of(current_key),
            "mask": peft_config._masks.get(current_key),
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, DowserLayer):
            target.update_layer(adapter_name, **options)
            return
        new_module = Linear(target, adapter_name, **options, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:  # an additional adapter does not train by itself
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if has_offloaded_params(unwrapped(child)):  # PEFT would move the adapter to where the weight is: nowhere
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: one batch with a different adapter per row is not supported")
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # The configuration is written after this, and may have served another model in the meantime.
        config.record_base(next((x.base_fingerprint[adapter_name] for x in _layers_with(model, adapter_name)), None))
        dtype = getattr(torch, config.save_dtype)
        suffix = f".dowser_values.{adapter_name}"
        return {key: value.to(dtype) if key.endswith(suffix) else value for key, value in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        try:
            _check_adapter_state(model, adapter_name, remapped)
        except Exception:
            _discard_waiting_adapter(model, config, adapter_name)
            raise
        return remapped


def _creates_meta_parameters() -> bool:
    """Whether we run inside accelerate's ``init_empty_weights``, where PEFT creates adapters to be loaded."""
    return nn.ParameterDict({"probe": nn.Parameter(torch.empty(0))})["probe"].device.type == "meta"


def _layers_with(model: nn.Module, adapter_name: str) -> Iterator[DowserLayer]:
    """The layers that have the adapter."""
    for module in model.modules():
        if isinstance(module, DowserLayer) and adapter_name in module.dowser_values:
            yield module


def _resolve_targets(model: nn.Module, config: DowserConfig) -> list[str]:
    """Names of the modules to adapt, in model order; ``config.target_modules`` is set to match exactly them."""
    if config.target_modules == DUMMY_TARGET_MODULES:
        return []
    if config.target_modules == config._default_targets:  # None, or resolved for an earlier model
        defaults = default_targets(model)
        if config.layers_to_transform is not None:
            endings = {name.rpartition(".")[2] for name in defaults}
            by_ending = dataclasses.replace(config, target_modules=sorted(endings))
            defaults = [name for name in defaults if check_target_module_exists(by_ending, name)]
        config.set_targets(defaults)
        _match_exactly(model, config, defaults)
    _maybe_include_all_linear_layers(config, model)
    inside: list[str] = []
    names = []
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside[-1])):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
        if check_target_module_exists(config, name):
            names.append(name)
    if config.num_last_layers is not None and names:
        names = last_layers(model, names, config.num_last_layers)
        config.set_targets(names)
        _match_exactly(model, config, names)
    return names


def _match_exactly(model: nn.Module, config: DowserConfig, names: list[str]) -> None:
    """PEFT matches endings: where other modules end like the targets (a vision tower's), use a regex instead."""
    endings = tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name, _ in model.named_modules() if name not in set(names)):
        config.target_modules = "|".join(re.escape(name) for name in names)


def _check_adapter_name(name: str) -> None:
    if not name or "." in name or hasattr(nn.ParameterDict, name):
        raise ValueError(f"{name!r} cannot be the name of an adapter: use letters, digits, '_' and '-'")


def _unmerge_all(model: nn.Module) -> None:
    """A new adapter is chosen for the base itself, and PEFT unmerges when it activates one."""
    merged = [layer for layer in model.modules() if isinstance(layer, DowserLayer) and layer.merged]
    if merged:
        warnings.warn("Unmerging the merged adapters: a new adapter is scored on the base model.", stacklevel=3)
    for layer in merged:
        layer.unmerge()


def _undo_injection(model: nn.Module, adapter_name: str, trainable: set[str]) -> None:
    """Remove an adapter whose injection failed half-way, and the layers that were made for it."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear) or adapter_name not in layer.dowser_values:
            continue
        del layer.dowser_values[adapter_name]
        if adapter_name in layer.dowser_mask:
            del layer.dowser_mask[adapter_name]
        if not layer.dowser_values:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


def _check_adaptable(model: nn.Module, names: list[str], is_fresh: bool) -> None:
    """Refuse targets that cannot be adapted, before anything is probed or replaced."""
    for name in names:
        module = model.get_submodule(name)
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, BaseTunerLayer) and not isinstance(module, DowserLayer):
            raise TypeError(
                f"Target module {name!r} is not supported: it already carries an adapter ({kind}). Adapt other "
                "modules, or merge or unload that adapter first"
            )
        if not is_linear(module):
            raise TypeError(
                f"Target module {name!r} of type {kind} is not supported. Currently, only `torch.nn.Linear`, "
                "`transformers.pytorch_utils.Conv1D` and linear layers quantised by bitsandbytes, HQQ or torchao "
                "are supported"
            )
        if 0 in linear_shape(module):
            raise ValueError(f"Target module {name!r} has no weights: {linear_shape(module)} [out, in]")
        backend = quantisation_of(module)
        if backend is None and not is_plain(module):
            raise TypeError(
                f"Target module {name!r} of type {kind} is not supported: it computes more than x W^T + b, or stores "
                f"its weight as {unwrapped(module).weight.dtype}. Leave it out with exclude_modules"
            )
        if backend is not None and not backend.supports_merge:
            raise TypeError(
                f"Target module {name!r} is not supported: its {backend.backend_name} weights cannot be "
                "dequantised. Use a bitsandbytes 4-bit or 8-bit base"
            )
        if is_fresh and backend is None and not is_at_hand(module):
            raise ValueError(
                f"Target module {name!r} has its weight on the meta device, so it cannot be scored: load the model "
                "with its weights before adding a new adapter"
            )


def _settle_config(model: nn.Module, config: DowserConfig, names: list[str]) -> None:
    """Warn about settings that do not fit the target modules, and correct what can be."""
    for name in names:
        transposed = is_transposed(model.get_submodule(name))
        if transposed != config.fan_in_fan_out:
            kind = "Conv1D" if transposed else "torch.nn.Linear"
            warnings.warn(
                f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module {name!r} is `{kind}`. "
                f"Setting fan_in_fan_out to {transposed}.",
                stacklevel=2,
            )
            config.fan_in_fan_out = transposed
            break
    used = {get_pattern_key(list(config.rho_pattern), name) for name in names}
    if unused := sorted(set(config.rho_pattern) - used):
        warnings.warn(f"these rho_pattern keys match no target module and are ignored: {unused}", stacklevel=2)


def _near_misses(model: nn.Module, target_modules: Any) -> str:
    """What the user may have meant: names of linear layers close to those asked for."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if name and is_linear(module)}
    wanted = [target_modules] if isinstance(target_modules, str) else sorted(target_modules or [])
    close = [near for name in wanted for near in difflib.get_close_matches(name.rpartition(".")[2], linear)]
    found = list(dict.fromkeys(close)) or sorted(linear)[:10]
    if isinstance(target_modules, str) and target_modules in linear:
        return f" A string is a regex that matches whole names: pass a list, target_modules=[{target_modules!r}]."
    return f" Linear layers of this model with {'similar' if close else 'other'} names: {found}."


def _warn_about_other_base(model: nn.Module, config: DowserConfig, names: list[str]) -> None:
    modules = {name: model.get_submodule(name) for name in names}
    if modules and config.base_fingerprint and differs_from(modules, config.base_fingerprint):
        warnings.warn(
            f"this adapter was trained on other base weights (fingerprint {config.base_fingerprint}; this model has "
            f"{base_fingerprint(modules)}): was another model, or another revision of it, meant? Adapter base: "
            f"{config.base_model_name_or_path!r}, revision {config.revision!r}",
            stacklevel=2,
        )


def _check_adapter_state(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Check values and masks against each other and the model, before any of them is loaded."""
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


def _discard_waiting_adapter(model: nn.Module, config: DowserConfig, adapter_name: str) -> None:
    """Undo the injection of an adapter whose file turned out to be unusable."""
    tuner = next((module for module in model.modules() if isinstance(module, BaseTuner)), None)
    waiting = any(layer.is_waiting(adapter_name) for layer in _layers_with(model, adapter_name))
    if tuner is None or not waiting:
        return
    if len(tuner.peft_config) > 1:
        tuner.delete_adapter(adapter_name)
        return
    base = tuner.unload()
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in config._trainable_before)
