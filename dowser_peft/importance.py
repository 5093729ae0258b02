"""Importance: from a bare model to where each target module trains. Probe, score, select.

This is the whole of the method's "before training": ``probe`` runs the model on prompts of its own,
``select_masks`` turns two factors per layer into one bit per weight, or the ids of whole columns, one layer at a
time.
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
    has_readable_weight,
    is_at_hand,
    is_linear,
    is_transposed,
    linear_shape,
    passes_gradients,
    quantisation_of,
    scorable_weight,
)
from dowser_peft.config import IMPORTANCE_NAMES, DowserConfig
from dowser_peft.factors import Factors
from dowser_peft.fused_experts import (
    FusedWeight,
    expert_name,
    expert_names,
    fused_weights,
    layers_named,
    probed_layers,
)
from dowser_peft.on_demand import weights_on_demand
from dowser_peft.partitioned import has_engine
from dowser_peft.probing import ProbeStatistics, Sampling, StoppingRule, WeightSample, collect_statistics, per_expert
from dowser_peft.ranks import Ranks, meet, receives_masks, warn_if_apart
from dowser_peft.scoring import bottom_rho_mask, num_trainable
from dowser_peft.scoring.columns import bottom_rho_columns
from dowser_peft.targets import default_parameters, default_targets, find_transformer, language_model

_FINGERPRINT_SAMPLES = 256  # weights per module
_SAMPLED_WEIGHTS = 1024  # per module, to tell how far the mask may still move
_SAMPLED_OF_EXPERT = 64  # of fused experts at least, each
_QUANTISED = "-quantised"


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
        images: put one synthetic image, noise, before each synthetic prompt, for a model that reads images.
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
        seed: of the prompts and the Rademacher vectors.
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
        estimator=estimator,  # type: ignore[arg-type]
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
    shapes = {name: _scored_shape(module) for name, module in modules.items()}
    if tolerance is not None:
        num_prompts, num_probes = num_prompts * num_probes, 1
    details = {"settings": checked.probe_settings(), "shapes": shapes, "own prompts": batches is None}
    warn_if_apart()
    ranks = _meet(model, "probe a model", details, has_weights=all(map(_has_weight, modules.values())))
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


def _scored_shape(module: Any) -> tuple[int, int]:
    """(out, in) of what has scores and a mask of its own: a linear layer, or one of fused experts."""
    return module.expert_shape if isinstance(module, FusedWeight) else linear_shape(module)


def _groups_per_expert(modules: dict[str, Any], groups: dict[str, str]) -> dict[str, str]:
    """The input groups in the order of ``modules``, every expert a group of its own."""
    found: dict[str, str] = {}
    for name in groups:
        names = expert_names(name, modules[name])
        found |= {name: groups[name]} if names == [name] else {expert: expert for expert in names}
    return found


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
        if not _has_weight(module) and not receives_masks():
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


def _has_weight(module: nn.Module) -> bool:
    return quantisation_of(module) is not None or is_at_hand(module)


def _meet(model: nn.Module, what: str, details: Any, *, has_weights: bool = True) -> Ranks:
    """The ranks that share the work, if each can run the model by itself.

    Where the weights themselves are spread over the ranks (tensor parallel, DeepSpeed ZeRO-3) a forward pass is work
    of all of them: there each rank does the same as the others, all of it.
    """
    spread = any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters())
    return Ranks() if spread else meet(what, details, has_weights=has_weights)


def select_masks(model: nn.Module, config: DowserConfig, names: list[str]) -> dict[str, torch.Tensor]:
    """Where each module in ``names`` trains, by ``config.importance``; probes if that needs it.

    Of several ranks the first chooses for all: two kinds of GPU may round a score differently, and masks that differ
    in one bit would give the values of two ranks different meanings. Ranks without weights (transformers loads none
    where FSDP is to send them) need none.

    Returns:
        By module: with granularity 'element' its packed mask, with 'column' the ids of its columns, int32 ``[k]``.
        Of fused experts the masks of all of them, one after another.
        A weight stored transposed (Conv1D) is masked as it lies: bit p belongs to entry p of the stored tensor;
        columns are always inputs.
    """
    importance = config.importance if config.importance in IMPORTANCE_NAMES else "statistics"
    rho = {name: config.rho_of(name) for name in names}
    details = {"rho": rho, "granularity": config.granularity, "importance": importance, "seed": config.seed}
    ranks = _meet(model, "add a new adapter", details)
    modules = layers_named(model, names)
    statistics = _statistics(model, config, modules)
    masks: dict[str, torch.Tensor] = {}
    with ranks.together():
        if statistics is not None:
            if config.importance not in IMPORTANCE_NAMES or statistics.mask_error is not None:
                config.record_probe(statistics)
            statistics.check_modules(
                {
                    part: _scored_shape(module)
                    for name, module in modules.items()
                    for part in expert_names(name, module)
                }
            )
        if ranks.is_first:
            masks = _select(model, config, modules, statistics)
    return ranks.share_tensors(masks)


def agreed_fingerprint(model: nn.Module, names: list[str]) -> str:
    """:func:`base_fingerprint` of the modules in ``names``, on every rank that of the first."""
    ranks = _meet(model, "add a new adapter", sorted(names))
    found = ""
    with ranks.together():
        if ranks.is_first:
            found = base_fingerprint(layers_named(model, names))
    return ranks.share(found)


def _select(
    model: nn.Module, config: DowserConfig, modules: dict[str, Any], statistics: ProbeStatistics | None
) -> dict[str, torch.Tensor]:
    """:func:`select_masks` of one process, given what it was probed for."""
    if statistics is not None:
        _check_same_base(model, statistics)
    by_column = config.granularity == "column"
    unit = "column" if by_column else "weight"
    factors = Factors(statistics, config.importance == "wanda")
    masks = {}
    without_weights = []
    for name, module in modules.items():
        rho = config.rho_of(name)
        shape = _scored_shape(module)
        size = shape[1] if by_column else shape[0] * shape[1]
        if round(rho * size) < 1:
            without_weights.append(f"{name!r} ({size} {unit}s)")
        if config.importance == "random":  # reads no weight
            chosen = [_random_choice(size, rho, config.seed, part) for part in expert_names(name, module)]
            masks[name] = chosen[0].nonzero().view(-1).int() if by_column else bitmask.pack(torch.cat(chosen))
            continue
        try:
            masks[name] = _selection(name, module, factors, rho, by_column)
        except ValueError as error:
            raise ValueError(f"cannot score module {name!r}: {error}") from error
    factors.warn_about_unreached()
    if without_weights:
        warnings.warn(
            f"rho={config.rho:g} leaves no trainable {unit} in {len(without_weights)} of {len(modules)} modules, such "
            f"as {without_weights[0]}: one {unit} trains in each of them",
            stacklevel=2,
        )
    return masks


def _selection(name: str, module: Any, factors: Factors, rho: float, by_column: bool) -> torch.Tensor:
    """Mask, or ids of columns, of one module; of fused experts the masks of all, one after another."""
    shape = _scored_shape(module)
    if isinstance(module, FusedWeight):
        masks = [
            _lowest(matrix, *factors.of(expert_name(name, index), shape), rho, module.is_transposed)
            for index, matrix in enumerate(module.parameter.detach())
        ]
        return bitmask.concatenate(masks, module.rows * module.columns)
    activation, sensitivity = factors.of(name, shape)
    transposed = is_transposed(module)
    with scorable_weight(module) as weight:
        try:
            if by_column:
                if isinstance(weight, torch.Tensor) and transposed:
                    weight = weight.T  # [out, in]
                return bottom_rho_columns(weight, activation, sensitivity, rho)
            return _lowest(weight, activation, sensitivity, rho, transposed)
        finally:
            del weight  # before the next one is brought back from offloading


def _lowest(
    weight: Any, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float, transposed: bool
) -> torch.Tensor:
    """Mask of a matrix as it lies, [out, in] or transposed."""
    if transposed:  # S^T = |W^T| * (A^T Psi): the same function with its factors swapped
        activation, sensitivity = sensitivity, activation
    return bottom_rho_mask(weight, activation, sensitivity, rho)


def _statistics(model: nn.Module, config: DowserConfig, modules: dict[str, Any]) -> ProbeStatistics | None:
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
        settings = config.probe_settings()
        if config.importance == "wanda":  # needs activations only
            settings |= {"num_probes": 1, "tolerance": None}
        parameters = [name for name, module in modules.items() if isinstance(module, FusedWeight)]
        names = [name for name in modules if name not in parameters]
        return probe(model, target_modules=names, target_parameters=parameters, **settings)
    return ProbeStatistics.load(config.importance)


def _check_same_base(model: nn.Module, statistics: ProbeStatistics) -> None:
    """Warn if the statistics were taken on other weights of the same shapes."""
    modules = probed_layers(model, statistics.module_names)
    if modules is None:
        return  # only a part of what was probed
    if differs_from(modules, statistics.fingerprint):
        found = base_fingerprint(modules)
        warnings.warn(
            f"the probe statistics were taken on other base weights (fingerprint {statistics.fingerprint}; this "
            f"model has {found}), so the masks may not fit it. Probe this model unless that is meant",
            stacklevel=3,
        )


def _random_choice(size: int, rho: float, seed: int, name: str) -> torch.Tensor:
    """Boolean ``[size]``: a random subset of that many weights or columns."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.randperm(size, generator=generator)[: num_trainable(size, rho)]] = True
    return chosen


def base_fingerprint(modules: dict[str, Any]) -> str:
    """Hash of the shapes of ``modules`` and the signs of some evenly spaced weights: tells base weights apart.

    Signs, because they survive a change of dtype. Names and order are left out, because they depend on the
    wrapper. Quantisation changes signs: such a fingerprint ends in "-quantised" and compares with no other. Of a
    weight that cannot be read, the shape alone counts.
    """
    digests = []
    for module in modules.values():
        if not has_readable_weight(module):
            digests.append(hashlib.sha256(repr(linear_shape(module)).encode()).digest())
            continue
        with base_weight(module) as weight:
            flat = weight.reshape(-1)
            steps = torch.arange(_FINGERPRINT_SAMPLES, device=flat.device)
            where = steps * (flat.numel() - 1) // (_FINGERPRINT_SAMPLES - 1)  # integers: float32 ends at 2^24
            signs = torch.signbit(flat[where]).cpu().numpy().tobytes()
            digests.append(hashlib.sha256(repr(tuple(weight.shape)).encode() + signs).digest())
    quantised = any(_is_quantised(module) for module in modules.values())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16] + (_QUANTISED if quantised else "")


def differs_from(modules: dict[str, Any], fingerprint: str) -> bool:
    """Whether ``modules`` surely have other base weights; quantised ones, or none in memory, cannot tell."""
    if is_of_quantised_base(fingerprint):
        return False
    if any(_is_quantised(module) or not is_at_hand(module) for module in modules.values()):
        return False
    return base_fingerprint(modules) != fingerprint


def is_of_quantised_base(fingerprint: str | None) -> bool:
    """Whether a fingerprint was taken on a quantised model."""
    return fingerprint is not None and fingerprint.endswith(_QUANTISED)


def _is_quantised(module: Any) -> bool:
    """Whether the signs of the weight are not those of the base model, or cannot be read."""
    return quantisation_of(module) is not None or not has_readable_weight(module)


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
