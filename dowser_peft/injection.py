"""Around injection: which modules are meant, whether they can be adapted, and how to undo it.

Everything that can go wrong is checked before the model is probed and before the first layer is replaced.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from itertools import combinations
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dowser_peft.base_layer import (
    has_readable_weight,
    has_weight,
    is_linear,
    is_plain,
    is_transposed,
    linear_shape,
    maps_features,
    passes_gradients,
    quantisation_of,
    stored_dtype,
    unwrapped,
)
from dowser_peft.config import DowserConfig
from dowser_peft.experts_layer import FusedExperts, unwrap_experts
from dowser_peft.fingerprint import base_fingerprint, differs_from, is_of_quantised_base
from dowser_peft.fused_experts import fused_weights, layers_named
from dowser_peft.parameter_targets import resolve_parameters
from dowser_peft.partitioned import has_engine
from dowser_peft.ranks import is_sharded, receives_masks
from dowser_peft.targets import default_targets, last_layers
from dowser_peft.tuner_layer import DowserLayer, layers_with


def check_adapter_name(name: str) -> None:
    if not name or "." in name or hasattr(nn.ParameterDict, name):
        raise ValueError(f"{name!r} cannot be the name of an adapter: use letters, digits, '_' and '-'")


def resolve_targets(
    model: nn.Module, config: DowserConfig, parameters_by_default: bool
) -> tuple[list[str], list[str]]:
    """Names of the modules and of the fused parameters to adapt, in model order; the targets of ``config`` are set
    to match exactly them. ``parameters_by_default``: its target parameters are the default ones.
    """
    if config.target_modules == DUMMY_TARGET_MODULES:
        return [], []
    parameters = resolve_parameters(model, config, parameters_by_default)
    if config.target_modules == config._default_targets:  # None, or resolved for an earlier model
        defaults = default_targets(model)
        if config.layers_to_transform is not None:
            endings = {name.rpartition(".")[2] for name in defaults}
            by_ending = dataclasses.replace(config, target_modules=sorted(endings))
            defaults = [name for name in defaults if check_target_module_exists(by_ending, name)]
        config.set_targets(defaults)
        match_exactly(model, config, defaults)
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
    if config.num_last_layers is not None and (names or parameters):
        kept = set(last_layers(model, names + parameters, config.num_last_layers))
        names = [name for name in names if name in kept]
        config.set_targets(names)
        match_exactly(model, config, names)
        if parameters:
            parameters = config.target_parameters = [name for name in parameters if name in kept]
    return names, parameters


def match_exactly(model: nn.Module, config: DowserConfig, names: list[str]) -> None:
    """Let ``config`` target these modules and no others."""
    if (pattern := exact_pattern(model, names)) is not None:
        config.target_modules = pattern
        config.layers_to_transform = config.layers_pattern = None  # the names say it, and a regex excludes them


def exact_pattern(model: nn.Module, names: list[str]) -> str | None:
    """A regex of exactly these modules, if their names would not do.

    PEFT matches endings: other modules (a vision tower's) may end like the targets.
    """
    wanted, endings = set(names), tuple(f".{name}" for name in names)
    if any(name.endswith(endings) for name, _ in model.named_modules() if name not in wanted):
        return "|".join(re.escape(name) for name in names)
    return None


def check_adaptable(model: nn.Module, names: list[str], config: DowserConfig, is_fresh: bool) -> None:
    """Refuse targets that cannot be adapted, before anything is probed or replaced.

    Raises:
        TypeError: if a module is of a kind that has no adapter; the message names it.
        ValueError: if its weight is empty, shared with another target, or not at hand to be scored; if the module
            has an adapter of the other granularity; if the model has been sharded, or ZeRO-3's engine runs it.
    """
    if is_fresh and is_sharded(model):
        raise ValueError(
            "this model has been sharded by fully_shard (FSDP2), but adapters are chosen from whole weights: add it "
            "before fully_shard, accelerator.prepare or trainer.train()"
        )
    if is_fresh and has_engine(model):
        raise ValueError(
            "DeepSpeed's ZeRO-3 engine runs this model, and would neither train nor partition the values of a new "
            "adapter: add it before the model goes to the Trainer, accelerator.prepare or deepspeed.initialize"
        )
    check_kind = _check_column_target if config.granularity == "column" else _check_element_target
    owner: dict[int, str] = {}
    for name in names:
        module = model.get_submodule(name)
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, BaseTunerLayer) and not isinstance(module, DowserLayer):
            raise TypeError(
                f"Target module {name!r} is not supported: it already carries an adapter ({kind}). Adapt other "
                "modules, or merge or unload that adapter first"
            )
        if isinstance(module, DowserLayer) and module.granularity != config.granularity:
            raise ValueError(
                f"Target module {name!r} has an adapter with granularity={module.granularity!r}, and one layer cannot "
                f"take another with granularity={config.granularity!r}: adapt other modules, or load the base model "
                "again"
            )
        check_kind(name, module, kind)
        if config.granularity == "column" and not config.inference_mode and not passes_gradients(module):
            raise ValueError(
                f"Target module {name!r} cannot train whole columns: its layer quantises the input as well and passes "
                "no gradient on to it. Use granularity='element', which computes with the dequantised weight, or "
                "quantise weights only (torchao: Int8WeightOnlyConfig)"
            )
        if 0 in linear_shape(module):
            raise ValueError(f"Target module {name!r} has no weights: {linear_shape(module)} [out, in]")
        first = owner.setdefault(id(getattr(unwrapped(module), "weight", module)), name)
        if first != name:
            raise ValueError(
                f"Target modules {first!r} and {name!r} share one weight, and only one of two deltas on it could be "
                "merged and taken back. Leave one out with exclude_modules"
            )
        readable = has_readable_weight(module)
        if is_fresh and not readable and config.importance != "random":
            raise ValueError(
                f"Target module {name!r} of type {kind} cannot be scored: it is no plain x W^T + b on floats, and its "
                "weight cannot be dequantised. Use importance='random'; or choose the columns on the unquantised "
                "base model, save that adapter, and train it here: PeftModel.from_pretrained(base, path, "
                "is_trainable=True)"
            )
        if is_fresh and readable and not has_weight(module) and not receives_masks():
            raise ValueError(
                f"Target module {name!r} has its weight on the meta device, so it cannot be scored: load the model "
                "with its weights before adding a new adapter"
            )


def _check_element_target(name: str, module: nn.Module, kind: str) -> None:
    if not is_linear(module):
        raise TypeError(
            f"Target module {name!r} of type {kind} is not supported. Currently, only `torch.nn.Linear`, "
            "`transformers.pytorch_utils.Conv1D` and linear layers quantised by bitsandbytes, HQQ or torchao "
            "are supported, and with granularity='column' any that has `in_features` and `out_features`"
        )
    backend = quantisation_of(module)
    if backend is None and not is_plain(module):
        raise TypeError(
            f"Target module {name!r} of type {kind} is not supported: it computes more than x W^T + b, or stores "
            f"its weight as {stored_dtype(module) or 'something else'}. Load the model unquantised (of fp8: "
            "FineGrainedFP8Config(dequantize=True)), leave it out with exclude_modules, or use granularity='column'"
        )
    if backend is not None and not backend.supports_merge:
        raise TypeError(
            f"Target module {name!r} is not supported: its {backend.backend_name} weights cannot be "
            "dequantised. Use a bitsandbytes 4-bit or 8-bit base, or granularity='column'"
        )


def _check_column_target(name: str, module: nn.Module, kind: str) -> None:
    if not maps_features(module):
        raise TypeError(
            f"Target module {name!r} of type {kind} is not supported: it is not a linear layer, and has no "
            "`in_features` and `out_features`"
        )


def settle_config(model: nn.Module, config: DowserConfig, names: list[str], parameters: list[str]) -> None:
    """Warn about settings that do not fit the targets, and correct what can be."""
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
    used = {config.rho_key_of(name) for name in names + parameters}
    if unused := sorted(set(config.rho_pattern) - used):
        warnings.warn(f"these rho_pattern keys match no target module and are ignored: {unused}", stacklevel=2)


def near_misses(model: nn.Module, target_modules: Any) -> str:
    """What the user may have meant: names of linear layers close to those asked for."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if name and is_linear(module)}
    wanted = [target_modules] if isinstance(target_modules, str) else sorted(target_modules or [])
    close = [near for name in wanted for near in difflib.get_close_matches(name.rpartition(".")[2], linear)]
    found = list(dict.fromkeys(close)) or sorted(linear)[:10]
    if isinstance(target_modules, str) and target_modules in linear:
        return f" A string is a regex that matches whole names: pass a list, target_modules=[{target_modules!r}]."
    fused = next((name for name, _ in fused_weights(model)), None)
    hint = "" if fused is None else f" Experts are parameters: name them in target_parameters, such as {fused!r}."
    return f" Linear layers of this model with {'similar' if close else 'other'} names: {found}.{hint}"


def warn_about_other_base(model: nn.Module, config: DowserConfig, names: list[str]) -> None:
    modules = layers_named(model, names)
    if modules and config.base_fingerprint and differs_from(modules, config.base_fingerprint):
        warnings.warn(
            f"this adapter was trained on other base weights (fingerprint {config.base_fingerprint}; this model has "
            f"{base_fingerprint(modules)}): was another model, or another revision of it, meant? Adapter base: "
            f"{config.base_model_name_or_path!r}, revision {config.revision!r}",
            stacklevel=2,
        )


def warn_about_different_bases(model: nn.Module, adapters: list[str]) -> None:
    """Warn if a layer has adapters that were chosen for different base weights.

    Only of adapters of the same modules: fingerprints are of the modules that an adapter has.
    """
    found: dict[str, tuple[set[DowserLayer], str]] = {}
    for adapter in adapters:
        layers = set(layers_with(model, adapter))
        recorded = next((layer.base_fingerprint.get(adapter) for layer in layers), None)
        if recorded is not None and not is_of_quantised_base(recorded):
            found[adapter] = layers, recorded
    for (one, (layers, fingerprint)), (other, (others, second)) in combinations(found.items(), 2):
        if layers == others and fingerprint != second:
            warnings.warn(
                f"adapters {one!r} and {other!r} were trained on different base weights (fingerprints {fingerprint} "
                f"and {second}): their combination fits neither",
                stacklevel=3,
            )


def unmerge_all(model: nn.Module) -> None:
    """A new adapter is made for the base itself, and PEFT unmerges when it activates one."""
    merged = [layer for layer in model.modules() if isinstance(layer, DowserLayer) and layer.merged]
    if merged:
        warnings.warn("Unmerging the merged adapters: a new adapter is made for the base model.", stacklevel=3)
    for layer in merged:
        layer.unmerge()


def keep_selections_from_ddp(model: nn.Module, adapter_name: str) -> None:
    """Let DistributedDataParallel leave masks and columns alone: it would send them in every step.

    They never change, and are the same on all ranks: a new adapter's come from the first, others from one file. The
    names are those that they have below ``model`` and below PEFT's wrappers around it, one of which DDP is given.
    """
    layers = set(layers_with(model, adapter_name))
    names = [
        f"{wrapper}{name}.{layer.selection_name}.{adapter_name}"
        for name, layer in model.named_modules()
        if layer in layers
        for wrapper in ("", "model.", "base_model.model.")
    ]
    others = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, {*others, *names})


def undo_injection(model: nn.Module, adapter_name: str, trainable: set[str]) -> None:
    """Remove an adapter whose injection failed half-way, and the layers that were made for it."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, DowserLayer) or adapter_name not in layer.dowser_values:
            continue
        del layer.dowser_values[adapter_name]
        if adapter_name in layer.selections:
            del layer.selections[adapter_name]
        if not layer.dowser_values:
            parent, _, child = name.rpartition(".")
            if isinstance(layer, FusedExperts):
                delattr(model.get_submodule(parent), child)
            else:
                setattr(model.get_submodule(parent), child, layer.base_layer)
    unwrap_experts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
