"""DowserModel: which modules are adapted, and where in them.

All paths that create an adapter go through ``inject_adapter``: ``get_peft_model``, ``add_adapter``,
``load_adapter``, ``from_pretrained`` and transformers' own methods. There a fresh adapter is probed, scored
and selected; an adapter that is being loaded gets room for its values and masks, and never probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import has_offloaded_params
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from dowser_peft.adapter_state import (
    check_adapter_state,
    check_replacement,
    check_whole,
    discard_waiting_adapter,
    forget_other_base,
)
from dowser_peft.base_layer import is_at_hand, unwrapped
from dowser_peft.column_layer import ColumnLinear
from dowser_peft.combining import (
    CombinationType,
    MajoritySignMethod,
    check_combination,
    combine_values,
)
from dowser_peft.derived import Size, derived_config
from dowser_peft.experts_layer import Experts, FusedExperts, adapt_parameter
from dowser_peft.fingerprint import agreed_fingerprint, base_fingerprint
from dowser_peft.importance import select_masks
from dowser_peft.injection import (
    check_adaptable,
    check_adapter_name,
    keep_selections_from_ddp,
    near_misses,
    resolve_targets,
    settle_config,
    undo_injection,
    unmerge_all,
    warn_about_different_bases,
    warn_about_other_base,
)
from dowser_peft.layer import Linear
from dowser_peft.parameter_targets import check_parameters
from dowser_peft.ranks import receives_masks, several_ranks
from dowser_peft.tuner_layer import DowserLayer, layers_with

# What fsdp_activation_checkpointing and torch.compile put around decoder layers.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")

# Fields of the caller's config that injection may settle, as PEFT's own tuners do.
_SETTLED = ("target_modules", "target_parameters", "layers_to_transform", "layers_pattern", "fan_in_fan_out")


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
        as_given = {name: getattr(config, name) for name in _SETTLED}
        by_default = config.target_modules == config._default_targets  # None, or resolved for an earlier model
        parameters_by_default = by_default and config.target_parameters == config._default_parameters
        trainable: set[str] | None = None
        is_fresh = not (
            config.is_saved_adapter
            or config.inference_mode
            or low_cpu_mem_usage
            or _creates_meta_parameters()
            or state_dict is not None
        )
        try:
            check_adapter_name(adapter_name)
            self._check_new_adapter_config(config)
            modules, parameters = resolve_targets(model, config, parameters_by_default)
            config._parameters = parameters
            check_adaptable(model, modules, config, is_fresh)
            check_parameters(model, parameters, is_fresh)
            settle_config(model, config, modules, parameters)
            names = modules + parameters
            fingerprint = config.base_fingerprint
            if is_fresh and names:
                unmerge_all(model)
                config._masks = select_masks(model, config, names)
                fingerprint = agreed_fingerprint(model, names)
            elif config.is_saved_adapter:
                warn_about_other_base(model, config, names)
            config._trainable_before = trainable = {n for n, p in model.named_parameters() if p.requires_grad}
            BaseTuner.inject_adapter(
                self,
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=None if parameters else state_dict,  # PEFT finds no parameters by its keys
            )
        except BaseException as error:
            if trainable is not None:
                undo_injection(model, adapter_name, trainable)
            del self.peft_config[adapter_name]
            vars(config).update(as_given)
            if isinstance(error, NoMatchingPeftModuleError):
                raise NoMatchingPeftModuleError(f"{error}{near_misses(model, config.target_modules)}") from error
            raise
        finally:
            config._masks, config._parameters = {}, []
        if by_default:
            config._default_targets = config.target_modules
        if parameters_by_default:
            config._default_parameters = config.target_parameters
        for layer in layers_with(model, adapter_name):
            layer.base_fingerprint[adapter_name] = fingerprint
        if several_ranks():
            keep_selections_from_ddp(model, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: CombinationType = "linear",
        density: float | None = None,
        majority_sign_method: MajoritySignMethod = "total",
    ) -> None:
        """Add a combination of adapters as a new one, frozen and inactive; it trains wherever one of them does.

            model.add_weighted_adapter(["math", "code"], [0.7, 0.3], "both")
            model.set_adapter("both")

        Args:
            adapters: names of the adapters.
            weights: one a name, of any sign.
            adapter_name: of the new adapter.
            combination_type: "linear" (the weighted sum), or "ties", "dare_linear", "dare_ties" or
                "magnitude_prune", as PEFT computes them for LoRA.
            density: for all but "linear": the share of each adapter's values that is kept.
            majority_sign_method: "total" or "frequency", for "ties" and "dare_ties".

        Raises:
            ValueError: if there is no such adapter or combination, the new name is taken, or the adapters cannot be
                combined: granularities differ, biases train, or modules are saved in full.
        """
        configs: dict[str, Any] = self.peft_config
        options = (combination_type, density, majority_sign_method)
        check_combination(configs, adapters, weights, adapter_name, *options)
        for name, layer in self.model.named_modules():
            if isinstance(layer, FusedExperts) and any(adapter in layer.dowser_values for adapter in adapters):
                raise ValueError(
                    f"adapters of fused experts ({name!r}) cannot be combined yet: merge one after another"
                )
        warn_about_different_bases(self.model, adapters)
        unmerge_all(self.model)  # the fingerprint below is that of the base
        selections, values, sizes = {}, {}, {}
        for name, layer in self.model.named_modules():
            if not isinstance(layer, DowserLayer):
                continue
            parts = [
                (adapter, weight)
                for adapter, weight in zip(adapters, weights, strict=True)
                if adapter in layer.dowser_values and not layer.is_waiting(adapter)
            ]
            if not parts:
                continue
            selections[name] = layer.union([adapter for adapter, _ in parts])
            values[name] = combine_values(layer, selections[name], parts, *options)
            total = layer.in_features if layer.granularity == "column" else layer.numel
            sizes[name] = Size(values[name].shape[-1], total)
        if not sizes:
            raise ValueError(f"there is nothing to combine: no layer has one of {adapters}, or none was loaded")
        first = configs[adapters[0]]
        config = derived_config(self.model, first, sizes)
        config._masks, config.inference_mode = selections, True  # not to be probed
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trainable)
        config.inference_mode = first.inference_mode
        fingerprint = base_fingerprint({name: self.model.get_submodule(name) for name in sizes})
        for name, combined in values.items():
            layer = self.model.get_submodule(name)
            layer.dowser_values[adapter_name] = nn.Parameter(combined, requires_grad=False)
            layer.base_fingerprint[adapter_name] = fingerprint

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # asked for explicitly: values in the dtype of the base, however loaded
            for layer in layers_with(self.model, adapter_name):
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
        rho, where = peft_config.rho_of(current_key), peft_config._masks.get(current_key)
        options = {"init_weights": peft_config.init_weights, "inference_mode": peft_config.inference_mode}
        if isinstance(target, DowserLayer):
            target.update_layer(adapter_name, rho, where, **options)
            return
        layer_class = ColumnLinear if peft_config.granularity == "column" else Linear
        quantisation = get_quantization_kwargs(self.model)
        new_module = layer_class(target, adapter_name, rho, where, **options, **quantisation)
        if adapter_name not in self.active_adapters:  # an additional adapter does not train by itself
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        options = {"init_weights": peft_config.init_weights, "inference_mode": peft_config.inference_mode}
        options |= get_quantization_kwargs(self.model)
        for name in peft_config._parameters:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                rho, where = peft_config.rho_of(name), peft_config._masks.get(name)
                layer = adapt_parameter(model, name, adapter_name, rho, where, options)
            if adapter_name not in self.active_adapters:  # an additional adapter does not train by itself
                layer.dowser_values[adapter_name].requires_grad_(False)
        return list(peft_config._parameters)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A base layer that comes back is whole: PEFT would look for a weight, which one of HQQ does not have, nor
        # experts by that name, nor a container that was saved in full. And it would move the adapter to where an
        # absent weight is: nowhere.
        is_whole = isinstance(child, DowserLayer | Experts | AuxiliaryTrainingWrapper)
        if is_whole or _is_absent(unwrapped(child)):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        layers = [module for module in self.model.modules() if isinstance(module, DowserLayer)]
        for layer in layers:
            layer.check_mergeable()
        if any(getattr(layer.quantization_backend, "backend_name", "").startswith("bnb") for layer in layers):
            warnings.warn(
                "merging into 4-bit or 8-bit weights quantises them again, which loses small deltas: to keep them "
                "call base.dequantize() first, load the adapter on that and merge there",
                stacklevel=4,
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As of PEFT; what an error leaves half-merged is unmerged again."""
        layers = [module for module in self.model.modules() if isinstance(module, DowserLayer)]
        before = [len(layer.merged_adapters) for layer in layers]
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            for layer, count in zip(layers, before, strict=True):
                layer.unmerge_to(count)
            raise

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
        config.record_base(next((x.base_fingerprint[adapter_name] for x in layers_with(model, adapter_name)), None))
        for name, layer in model.named_modules():
            if not isinstance(layer, DowserLayer) or adapter_name not in layer.dowser_values:
                continue
            for wrapper in _WRAPPERS:  # in names of modules, from which PEFT tells what to save, but not of tensors
                name = name.replace(wrapper, "")
            values, selection = (f"{name}.{part}.{adapter_name}" for part in ("dowser_values", layer.selection_name))
            if values in state_dict:
                found[values] = state_dict[values]
                found[selection] = state_dict.get(selection, layer.selections[adapter_name])  # may not be persistent
        dtype = getattr(torch, config.save_dtype)
        suffix = f".dowser_values.{adapter_name}"
        check_whole({key: value for key, value in found.items() if key.endswith(suffix)})
        return {key: value.to(dtype) if key.endswith(suffix) else value for key, value in found.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():  # PEFT knows the persistent tensors only
            if isinstance(layer, DowserLayer) and adapter_name in layer.selections:
                key = f"{name}.{layer.selection_name}"
                for saved in {key, f"base_model.model.{key}"} & remapped.keys():
                    remapped[f"{key}.{adapter_name}"] = remapped.pop(saved)
        try:
            check_adapter_state(model, adapter_name, remapped)
            check_replacement(model, config, adapter_name, remapped)
        except Exception:
            discard_waiting_adapter(model, config, adapter_name)
            raise
        forget_other_base(model, adapter_name, remapped)
        return remapped


def _is_absent(base: nn.Module) -> bool:
    """Whether the weight of a layer is elsewhere for now."""
    return has_offloaded_params(base) or (receives_masks() and not is_at_hand(base))


def _creates_meta_parameters() -> bool:
    """Whether we run inside accelerate's ``init_empty_weights``, where PEFT creates adapters to be loaded."""
    return nn.ParameterDict({"probe": nn.Parameter(torch.empty(0))})["probe"].device.type == "meta"
