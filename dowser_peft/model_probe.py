"""One probe of one model: its statistics serve every rho and every task.

This is :mod:`dowser_peft.probing` for the models that people have: with adapters, quantised, offloaded, in several
processes. It says which modules are probed, and of which base weights the statistics are.
"""

from __future__ import annotations

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

from dowser_peft.base_layer import (
    base_weight,
    differentiable_4bit,
    has_weight,
    is_linear,
    is_transposed,
    passes_gradients,
    scored_shape,
)
from dowser_peft.config import DowserConfig
from dowser_peft.fingerprint import base_fingerprint
from dowser_peft.fused_experts import FusedWeight, expert_names, fused_weights
from dowser_peft.on_demand import weights_on_demand
from dowser_peft.partitioned import has_engine
from dowser_peft.probing import ProbeStatistics, Sampling, StoppingRule, WeightSample, collect_statistics, per_expert
from dowser_peft.ranks import meet_to_run, receives_masks, warn_if_apart
from dowser_peft.targets import default_parameters, default_targets, find_transformer, language_model

_SAMPLED_WEIGHTS = 1024  # per module, to tell how far the mask may still move
_SAMPLED_OF_EXPERT = 64  # of fused experts at least, each


def probe(
    model: nn.Module,
    *,
    num_prompts: int = 64,
    num_probes: int = 8,
    prompt_length: int = 64,
    batches: Iterable[Any] | None = None,
    images: bool = False,
    target_modules: list[str] | None = None,
    target_parameters: list[str] | None = None,
    estimator: str = "rms",
    temperature: float = 0.9,
    top_p: float = 0.9,
    repetition_penalty: float = 1.05,
    tolerance: float | None = None,
    rho: float = 0.1,
    batch_size: int | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True,
) -> ProbeStatistics:
    """Probe a model once, for every rho and every task (paper, section on probing).

    Without ``batches`` the model writes its own prompts; no data is needed. The model leaves as it came.

    Where torch.distributed is initialised with several processes, all of them have to make this call: they share the
    prompts, and all return the same statistics, those of one process. ``with this_rank_only():`` leaves the others
    out.

        statistics = probe(model)
        model = get_peft_model(model, DowserConfig(importance=statistics, rho=0.05))

    Args:
        model: a transformers model; any ``nn.Module`` if ``batches`` are given.
        num_prompts: N, synthetic prompts.
        num_probes: R, Rademacher vectors per prompt.
        prompt_length: tokens per prompt.
        batches: real inputs instead of synthetic prompts: mappings of keyword arguments (as a tokenizer or a
            data collator returns them), tensors, or sequences of positional arguments. Of several processes each
            probes a part if all have the same batches, and all of its own if they differ.
        images: put an image of noise before each prompt that a multimodal model writes.
        target_modules: full names of the modules to probe; default: the default targets of the adapter.
        target_parameters: full names of the fused experts to probe; default: those of the adapter, or none if
            ``target_modules`` are given.
        estimator: 'rms' (paper) or 'mean_abs' (the authors' code).
        temperature, top_p, repetition_penalty: sampling of the prompts.
        tolerance: end the probe as soon as the expected share of trained weights that unlimited probing would not
            train is at most this. One Rademacher vector is then drawn per prompt, and ``num_prompts * num_probes``
            prompts are the limit. Default: the paper's fixed N and R.
        rho: fraction of trained weights at which ``tolerance`` is measured; not used without it.
        batch_size: prompts per forward pass; default: from free memory. Does not change the result.
        seed: of the prompts, their images and the Rademacher vectors.
        tokenizer: tells which tokens are special; default: the model's own configs tell.
        progress: show a progress bar.

    Raises:
        ValueError: if there are no synthetic inputs for this kind of model, a module is never called, or an
            activation or gradient is NaN or infinite; the message names the module.
    """
    checked = DowserConfig(
        num_prompts=num_prompts,
        num_probes=num_probes,
        prompt_length=prompt_length,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        probe_tolerance=tolerance,
        probe_batch_size=batch_size,
        rho=rho,
        probe_images=images,
        estimator=estimator,  # type: ignore[arg-type]  # DowserConfig checks it
        seed=seed,
    )
    if tolerance is not None and batches is not None:
        raise ValueError("tolerance lets the model write as many prompts as it takes: leave it out with batches")
    if images and batches is not None:
        raise ValueError(
            "images are put before the model's own prompts: leave them out with batches, which bring theirs"
        )
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # its module names are those that a new adapter will look for
    if has_engine(model):
        raise ValueError(
            "DeepSpeed's ZeRO-3 engine runs this model, and gathers its weights for one backward pass only: probe (or "
            "add the adapter) before the model goes to the Trainer, accelerator.prepare or deepspeed.initialize"
        )
    modules = _modules_to_probe(model, target_modules, target_parameters)
    shapes = {name: scored_shape(module) for name, module in modules.items()}
    if tolerance is not None:
        num_prompts, num_probes = num_prompts * num_probes, 1
    details = {"settings": checked.probe_settings(), "shapes": shapes, "own prompts": batches is None}
    warn_if_apart()
    ranks = meet_to_run(model, "probe a model", details, has_weights=all(map(has_weight, modules.values())))
    with _bare(model):
        samples = {}
        fingerprint = ""
        with ranks.together():
            if ranks.is_first:
                samples = sampled_weights(modules) if tolerance is not None else {}
                fingerprint = base_fingerprint(modules)
        found = collect_statistics(
            model if batches is not None else _runnable(model, images=images),
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
            images=images,
            stopping=None if tolerance is None else StoppingRule(tolerance, rho, samples),
            ranks=ranks,
        )
        return ProbeStatistics(
            activations=per_expert({name: value.bfloat16() for name, value in found.activations.items()}),
            sensitivities=per_expert({name: value.bfloat16() for name, value in found.sensitivities.items()}),
            input_groups=_groups_per_expert(modules, found.input_groups),
            num_probes=num_probes,
            prompt_length=prompt_length if batches is None else 0,
            seed=seed,
            estimator=estimator,
            source="synthetic" if batches is None else "batches",
            fingerprint=ranks.share(fingerprint),
            versions={name: version(name) for name in ("dowser-peft", "torch", "transformers", "peft")},
            mask_error=found.mask_error,
            mask_error_rho=None if tolerance is None else rho,
            images=images,
        )


def _modules_to_probe(
    model: nn.Module, target_modules: list[str] | None, target_parameters: list[str] | None
) -> dict[str, Any]:
    names = default_targets(model) if target_modules is None else target_modules
    if target_parameters is None:
        target_parameters = default_parameters(model) if target_modules is None else []
    present = dict(model.named_modules())
    unknown = [names] if isinstance(names, str) else [name for name in names if name not in present]
    if unknown:
        example = next((name for name, module in present.items() if is_linear(module)), "")
        raise ValueError(
            f"target_modules must be a list of full module names for a probe, such as {example!r}; {unknown[0]!r} is "
            "none"
        )
    fused = dict(fused_weights(model)) if target_parameters else {}
    unknown = (
        [target_parameters] if isinstance(target_parameters, str) else [n for n in target_parameters if n not in fused]
    )
    if unknown:
        raise ValueError(
            "target_parameters must be a list of full names of fused experts for a probe, such as "
            f"{next(iter(fused), 'model.layers.0.mlp.experts.down_proj')!r}; {unknown[0]!r} is none"
        )
    modules = {name: present[name] for name in names} | {name: fused[name] for name in target_parameters}
    if not modules:
        raise ValueError("there are no target modules to probe: target_modules is empty")
    for name, module in modules.items():
        if not isinstance(module, FusedWeight) and not is_linear(module):
            raise TypeError(f"target module {name!r} is a {type(module).__name__}, not a linear layer")
        if not has_weight(module) and not receives_masks():
            raise ValueError(
                f"target module {name!r} has its weight on the meta device: load the model with its weights"
            )
        if not passes_gradients(module):
            raise ValueError(
                f"target module {name!r} cannot be probed: its layer quantises the input as well and passes no "
                "gradient on to it. Probe the unquantised model and pass importance=statistics, or quantise weights "
                "only (torchao: Int8WeightOnlyConfig)"
            )
    return modules


def sampled_weights(modules: dict[str, Any]) -> dict[str, WeightSample]:
    """Some weights of every module and every expert, to compare masks on; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    samples = {}

    def sample(name: str, matrix: torch.Tensor, size: int) -> None:  # [out, in]
        rows = torch.randint(matrix.shape[0], (size,), generator=generator)
        columns = torch.randint(matrix.shape[1], (size,), generator=generator)
        magnitudes = matrix[rows.to(matrix.device), columns.to(matrix.device)].abs().float().cpu()
        samples[name] = WeightSample(rows, columns, magnitudes, matrix.numel())

    for name, module in modules.items():
        if isinstance(module, FusedWeight):
            size = max(_SAMPLED_OF_EXPERT, _SAMPLED_WEIGHTS // module.num_experts)
            for index, part in enumerate(expert_names(name, module)):
                sample(part, module.expert(index), size)
            continue
        with base_weight(module) as weight:
            sample(name, weight.T if is_transposed(module) else weight, _SAMPLED_WEIGHTS)
    return samples


def _groups_per_expert(modules: dict[str, Any], groups: dict[str, str]) -> dict[str, str]:
    """The input groups in the order of ``modules``, every expert a group of its own."""
    found: dict[str, str] = {}
    for name in groups:
        names = expert_names(name, modules[name])
        found |= {name: groups[name]} if names == [name] else {expert: expert for expert in names}
    return found


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
        with differentiable_4bit(model), weights_on_demand(model):
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _runnable(model: nn.Module, *, images: bool) -> nn.Module:
    """What to run: the language model itself if it can write text on its own, else the transformers model, which is
    also what reads images.
    """
    language = language_model(model)[1]
    if not images and isinstance(language, PreTrainedModel) and language.can_generate():
        return language
    return find_transformer(model) or model
