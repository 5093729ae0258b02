"""What is in a file of probe statistics: per module the spread of activations, sensitivities and scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dowser_peft import ProbeStatistics
from dowser_peft.base_layer import base_weight, is_transposed, linear_shape
from dowser_peft.cli.naming import Place, in_model_order, places
from dowser_peft.fused_experts import expert_names, fused_weights
from dowser_peft.scoring import num_trainable

QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}

# Bins of the histogram of score / cut, in powers of ten: eight decades below the cut, four above it.
HISTOGRAM_EDGES = np.linspace(-8, 4, 193)


@dataclass(frozen=True)
class Scores:
    """The scores of one layer.

    Args:
        quantiles: of all its scores.
        cut: the largest score that still trains.
        histogram: how many weights have ``log10(score / cut)`` in each bin of ``HISTOGRAM_EDGES``; those beyond
            count in the outermost bins, scores of zero in the first.
    """

    quantiles: dict[str, float]
    cut: float
    histogram: np.ndarray


@dataclass(frozen=True)
class StatisticsRow:
    """One probed module; the quantiles of its activations are over inputs, of its sensitivities over outputs,
    each averaged over the prompts first.
    """

    name: str
    place: Place
    shape: tuple[int, int]
    activation: dict[str, float]
    sensitivity: dict[str, float]
    scores: Scores | None


def mask_error_fact(statistics: ProbeStatistics) -> dict[str, str]:
    """What to print about the mask error; nothing for a probe with fixed N and R."""
    if statistics.mask_error is None:
        return {}
    return {"mask error": f"{statistics.mask_error:.3f} expected, at rho = {statistics.mask_error_rho:g}"}


def statistics_rows(statistics: ProbeStatistics, model: nn.Module | None, rho: float) -> Iterator[StatisticsRow]:
    """One row a module.

    Args:
        statistics: of the probe.
        model: the base model; without it there are no scores.
        rho: the fraction of each layer below the cut.

    Raises:
        ValueError: if the model is of another architecture.
    """
    where = places(statistics.module_names)
    modules: dict[str, Any] = {}
    if model is not None:
        experts = {
            part: (weight, index)
            for name, weight in fused_weights(model)
            for index, part in enumerate(expert_names(name, weight))
        }
        modules = dict(model.named_modules()) | experts
        if missing := [name for name in statistics.module_names if name not in modules]:
            raise ValueError(f"the probe statistics are of another model: this one has no module {missing[0]!r}")
        modules = {name: modules[name] for name in statistics.module_names}
        statistics.check_modules(
            {name: m[0].expert_shape if isinstance(m, tuple) else linear_shape(m) for name, m in modules.items()}
        )
    for name in in_model_order(statistics.module_names):
        yield StatisticsRow(
            name=name,
            place=where[name],
            shape=statistics.shape(name),
            activation=_quantiles(statistics.activation(name).float().mean(0).numpy()),
            sensitivity=_quantiles(statistics.sensitivity(name).float().mean(0).numpy()),
            scores=_scores(statistics, name, modules[name], rho) if modules else None,
        )


def _scores(statistics: ProbeStatistics, name: str, module: Any, rho: float) -> Scores:
    """Quantiles, cut and histogram of ``S = |W| * (Psi^T A) / N``; the whole of S exists for one layer at a time.

    A module is a linear layer, or fused experts with the index of the one that is meant.
    """
    activation, sensitivity = statistics.activation(name).float(), statistics.sensitivity(name).float()
    layer, index = module if isinstance(module, tuple) else (module, None)
    with base_weight(layer) as weight, torch.no_grad():
        matrix = weight.T if is_transposed(layer) else weight
        if index is not None:
            matrix = layer.expert(index)
        score = sensitivity.T @ activation / statistics.num_prompts  # [out, N] @ [N, in]
        score *= matrix.abs().float().cpu()
    flat = score.numpy().reshape(-1)
    k = num_trainable(flat.size, rho)
    cut = float(np.partition(flat, k - 1)[k - 1])
    return Scores(_quantiles(flat), cut, _histogram(flat, cut))


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """The nearest values at ``QUANTILES``: never between two, so that they can be looked up."""
    places = {name: round(q * (values.size - 1)) for name, q in QUANTILES.items()}
    ordered = np.partition(values, sorted(set(places.values())))
    return {name: float(ordered[place]) for name, place in places.items()}


def _histogram(scores: np.ndarray, cut: float) -> np.ndarray:
    if cut <= 0:
        return np.zeros(HISTOGRAM_EDGES.size - 1, dtype=np.int64)
    with np.errstate(divide="ignore"):
        powers = np.log10(scores / np.float32(cut))
    return np.histogram(np.clip(powers, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)[0]
