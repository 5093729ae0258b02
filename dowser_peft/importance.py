"""Importance: from a bare model to the mask of each target module. Probe, score, select.

This is the whole of the method's "before training": ``probe`` runs the model on prompts of its own,
``select_masks`` turns two factors per layer into one bit per weight, one layer at a time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dowser_peft import bitmask
from dowser_peft.base_layer import (
    base_weight,
    differentiable_4bit,
    is_at_hand,
    is_linear,
    is_transposed,
    linear_shape,
    quantisation_of,
    scorable_weight,
)
from dowser_peft.blockwise import BlockwiseWeight
from dowser_peft.config import IMPORTANCE_NAMES, DowserConfig
from dowser_peft.probing import ProbeStatistics, Sampling, collect_statistics
from dowser_peft.scoring import bottom_rho_mask, num_trainable
from dowser_peft.targets import default_targets, find_transformer, language_model

_FINGERPRINT_SAMPLES = 256  # weights per module
_QUANTISED = "-quantised"


def probe(
    model: nn.Module,
    *,
    num_prompts: int = 64,
    num_probes: int = 8,
    prompt_length: int = 64,
    batches: Iterable[Any] | None = None,
    target_modules: list[str] | None = None,
    estimator: str = "rms",
    temperature: float = 0.9,
    top_p: float = 0.9,
    repetition_penalty: float = 1.05,
    batch_size: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> ProbeStatistics:
    """Probe a model once, for every rho and every task (paper, section on probing).

    Without ``batches`` the model writes its own prompts; no data is needed. The model leaves as it came.

        statistics = probe(model)
        model = get_peft_model(model, DowserConfig(importance=statistics, rho=0.05))

    Args:
        model: a transformers model; any ``nn.Module`` if ``batches`` are given.
        num_prompts: N, synthetic prompts.
        num_probes: R, Rademacher vectors per prompt.
        prompt_length: tokens per prompt.
        batches: real inputs instead of synthetic prompts: mappings of keyword arguments (as a tokenizer or a
            data collator returns them), tensors, or sequences of positional arguments.
        target_modules: full names of the modules to probe; default: the default targets of the adapter.
        estimator: 'rms' (paper) or 'mean_abs' (the authors' code).
        temperature, top_p, repetition_penalty: sampling of the prompts.
        batch_size: prompts per forward pass; default: from free memory. Does not change the result.
        seed: of the prompts and the Rademacher vectors.
        tokenizer: tells which tokens are special; default: the model's own configs tell.
        progress: show a progress bar.

    Raises:
        ValueError: if there are no synthetic inputs for this kind of model, a module is never called, or an
            activation or gradient is NaN or infinite; the message names the module.
    """
    DowserConfig(  # checks the values
        num_prompts=num_prompts,
        num_probes=num_probes,
        prompt_length=prompt_length,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        probe_batch_size=batch_size,
        estimator=estimator,  # type: ignore[arg-type]
    )
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # its module names are those that a new adapter will look for
    modules = _modules_to_probe(model, target_modules)
    shapes = {name: linear_shape(module) for name, module in modules.items()}
    with _bare(model):
        activations, sensitivities, input_groups = collect_statistics(
            _runnable(model) if batches is None else model,
            modules,
            shapes,
            num_prompts=num_prompts,
            num_probes=num_probes,
            prompt_length=prompt_length,
            batches=batches,
            estimator=estimator,
            sampling=Sampling(temperature, top_p, repetition_penalty),
            batch_size=batch_size,
            seed=seed,
            tokenizer=tokenizer,
            progress=progress,
        )
        return ProbeStatistics(
            activations={name: value.bfloat16() for name, value in activations.items()},
            sensitivities={name: value.bfloat16() for name, value in sensitivities.items()},
            input_groups=input_groups,
            num_probes=num_probes,
            prompt_length=prompt_length if batches is None else 0,
            seed=seed,
            estimator=estimator,
            source="synthetic" if batches is None else "batches",
            fingerprint=base_fingerprint(modules),
            versions={name: version(name) for name in ("dowser-peft", "torch", "transformers", "peft")},
        )


def _modules_to_probe(model: nn.Module, target_modules: list[str] | None) -> dict[str, nn.Module]:
    names = default_targets(model) if target_modules is None else target_modules
    present = dict(model.named_modules())
    unknown = [names] if isinstance(names, str) else [name for name in names if name not in present]
    if unknown:
        example = next((name for name, module in present.items() if is_linear(module)), "")
        raise ValueError(
            f"target_modules must be a list of full module names for a probe, such as {example!r}; {unknown[0]!r} is "
            "none"
        )
    modules = {name: present[name] for name in names}
    if not modules:
        raise ValueError("there are no target modules to probe: target_modules is empty")
    for name, module in modules.items():
        if not is_linear(module):
            raise TypeError(f"target module {name!r} is a {type(module).__name__}, not a linear layer")
        if quantisation_of(module) is None and not is_at_hand(module):
            raise ValueError(
                f"target module {name!r} has its weight on the meta device: load the model with its weights"
            )
    return modules


def select_masks(model: nn.Module, config: DowserConfig, names: list[str]) -> dict[str, torch.Tensor]:
    """Packed mask of each module in ``names``, by ``config.importance``; probes if that needs it.

    A weight stored transposed (Conv1D) is masked as it lies: bit p belongs to entry p of the stored tensor.
    """
    modules = {name: model.get_submodule(name) for name in names}
    statistics = _statistics(model, config, names)
    if statistics is not None:
        if config.importance not in IMPORTANCE_NAMES:
            config.record_probe(statistics)
        statistics.check_modules({name: linear_shape(module) for name, module in modules.items()})
        _check_same_base(model, statistics)
    masks = {}
    without_weights = []
    for name, module in modules.items():
        rho = config.rho_of(name)
        with scorable_weight(module) as weight:
            if round(rho * weight.numel()) < 1:
                without_weights.append(f"{name!r} ({weight.numel()} weights)")
            if config.importance == "random":
                masks[name] = _random_mask(weight, rho, config.seed, name)
                del weight
                continue
            activation, sensitivity = _factors(statistics, config, name, linear_shape(module))
            if is_transposed(module):  # S^T = |W^T| * (A^T Psi): the same function with its factors swapped
                activation, sensitivity = sensitivity, activation
            try:
                masks[name] = bottom_rho_mask(weight, activation, sensitivity, rho)
            except ValueError as error:
                raise ValueError(f"cannot score module {name!r}: {error}") from error
            finally:
                del weight  # before the next one is brought back from offloading
    if without_weights:
        warnings.warn(
            f"rho={config.rho:g} leaves no trainable weight in {len(without_weights)} of {len(modules)} modules, such "
            f"as {without_weights[0]}: one weight trains in each of them",
            stacklevel=2,
        )
    return masks


def _statistics(model: nn.Module, config: DowserConfig, names: list[str]) -> ProbeStatistics | None:
    if isinstance(config.importance, ProbeStatistics):
        return config.importance
    if config.importance in ("magnitude", "random"):
        return None
    if isinstance(model, PeftModel):
        raise ValueError(
            "this model already has an adapter: add another one with model.add_adapter(name, config), or load the "
            "base model again"
        )
    if config.importance in ("dowser", "wanda"):
        return probe(
            model,
            num_prompts=config.num_prompts,
            num_probes=config.num_probes if config.importance == "dowser" else 1,
            prompt_length=config.prompt_length,
            target_modules=names,
            estimator=config.estimator,
            temperature=config.temperature,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            batch_size=config.probe_batch_size,
            seed=config.seed,
        )
    return ProbeStatistics.load(config.importance)


def _check_same_base(model: nn.Module, statistics: ProbeStatistics) -> None:
    """Warn if the statistics were taken on other weights of the same shapes."""
    present = dict(model.named_modules())
    modules = {name: present[name] for name in statistics.module_names if name in present}
    if len(modules) < len(statistics.module_names):
        return  # only a part of what was probed
    if differs_from(modules, statistics.fingerprint):
        found = base_fingerprint(modules)
        warnings.warn(
            f"the probe statistics were taken on other base weights (fingerprint {statistics.fingerprint}; this "
            f"model has {found}), so the masks may not fit it. Probe this model unless that is meant",
            stacklevel=3,
        )


def _factors(
    statistics: ProbeStatistics | None, config: DowserConfig, name: str, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors (A, Psi) of the score of one module."""
    if statistics is None:  # 'magnitude'
        return torch.ones(1, shape[1]), torch.ones(1, shape[0])
    activation, sensitivity = statistics.activation(name), statistics.sensitivity(name)
    if config.importance == "wanda":
        return activation.float().mean(0, keepdim=True), torch.ones(1, shape[0])
    if not activation.any() or not sensitivity.any():
        warnings.warn(
            f"no prompt reached module {name!r} (an expert that is never chosen?): its weights are ranked by "
            "magnitude",
            stacklevel=3,
        )
        return torch.ones(1, shape[1]), torch.ones(1, shape[0])
    return activation, sensitivity


def _random_mask(weight: torch.Tensor | BlockwiseWeight, rho: float, seed: int, name: str) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    chosen = torch.randperm(weight.numel(), generator=generator)[: num_trainable(weight.numel(), rho)]
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[chosen] = True
    return bitmask.pack(mask).to(weight.device)


def base_fingerprint(modules: dict[str, nn.Module]) -> str:
    """Hash of the shapes of ``modules`` and the signs of some evenly spaced weights: tells base weights apart.

    Signs, because they survive a change of dtype. Names and order are left out, because they depend on the
    wrapper. Quantisation changes signs: such a fingerprint ends in "-quantised" and compares with no other.
    """
    digests = []
    for module in modules.values():
        with base_weight(module) as weight:
            flat = weight.reshape(-1)
            steps = torch.arange(_FINGERPRINT_SAMPLES, device=flat.device)
            where = steps * (flat.numel() - 1) // (_FINGERPRINT_SAMPLES - 1)  # integers: float32 ends at 2^24
            signs = torch.signbit(flat[where]).cpu().numpy().tobytes()
            digests.append(hashlib.sha256(repr(tuple(weight.shape)).encode() + signs).digest())
    quantised = any(quantisation_of(module) for module in modules.values())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16] + (_QUANTISED if quantised else "")


def differs_from(modules: dict[str, nn.Module], fingerprint: str) -> bool:
    """Whether ``modules`` surely have other base weights; quantised ones, or none in memory, cannot tell."""
    if fingerprint.endswith(_QUANTISED):
        return False
    if any(quantisation_of(module) or not is_at_hand(module) for module in modules.values()):
        return False
    return base_fingerprint(modules) != fingerprint


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The base model without its adapters, except those that are merged into it."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not module.disable_adapters
        and not getattr(module, "merged", False)
    ]
    try:
        for layer in layers:
            layer._disable_adapters = True
        with differentiable_4bit(model):
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _runnable(model: nn.Module) -> nn.Module:
    """What to run: the language model itself if it can write text on its own, else the transformers model."""
    language = language_model(model)[1]
    if isinstance(language, PreTrainedModel) and language.can_generate():
        return language
    return find_transformer(model) or model
