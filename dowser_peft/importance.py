"""Importance: from a bare model to where each target module trains. Probe, score, select.

This is the whole of the method's "before training": ``probe`` runs the model on prompts of its own,
``select_masks`` turns two factors per layer into one bit per weight, or the ids of whole columns, one layer at a
time.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from dowser_peft import bitmask
from dowser_peft.base_layer import is_transposed, scorable_weight, scored_shape
from dowser_peft.config import IMPORTANCE_NAMES, DowserConfig
from dowser_peft.factors import Factors
from dowser_peft.fingerprint import base_fingerprint, differs_from
from dowser_peft.fused_experts import FusedWeight, expert_name, expert_names, layers_named, probed_layers
from dowser_peft.model_probe import probe
from dowser_peft.probing import ProbeStatistics
from dowser_peft.ranks import meet_to_run
from dowser_peft.scoring import bottom_rho_mask, num_trainable
from dowser_peft.scoring.columns import bottom_rho_columns


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
    ranks = meet_to_run(model, "add a new adapter", details)
    modules = layers_named(model, names)
    statistics = _statistics(model, config, modules)
    masks: dict[str, torch.Tensor] = {}
    with ranks.together():
        if statistics is not None:
            if config.importance not in IMPORTANCE_NAMES or statistics.mask_error is not None:
                config.record_probe(statistics)
            statistics.check_modules(
                {part: scored_shape(module) for name, module in modules.items() for part in expert_names(name, module)}
            )
        if ranks.is_first:
            masks = _select(model, config, modules, statistics)
    return ranks.share_tensors(masks)


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
        shape = scored_shape(module)
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
    shape = scored_shape(module)
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
