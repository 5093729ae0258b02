"""How close data-free scores come to scores from real data, as a function of N and R, and what |W| alone reaches.

The reference is the score from 256 real questions of the old tasks, images included, R = 8. Compared with it, per
weight matrix and averaged over matrices: the Spearman correlation of the scores, and the Hamming distance of the
masks at rho = 0.1 (share of mask bits that differ; 0.18 for a random mask). Rows:

    synthetic          the paper's probe, N prompts of the model's own and R sign vectors
    random tokens      N prompts of random tokens
    real               N other real questions: how far two draws of real data are apart
    wanda              |W| |h| of the synthetic probe
    without weight     ||J|| |h| of the synthetic probe, against the reference with its |W|
    magnitude, random  |W| alone, and no information at all; they need no probe (N = R = 0)

About 5 core-minutes for each pretraining seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.forgetting.experiment import provenance
from benchmarks.forgetting.methods import Data, target_modules
from benchmarks.forgetting.methods.adapters import lowest, random_token_batches, scores
from benchmarks.forgetting.miniature import STEPS, data_of, load_base
from benchmarks.forgetting.rows import Row
from dowser_peft import ProbeStatistics, probe

RESULTS = Path(__file__).parent / "results" / "stability.jsonl"
RHO = 0.1
REFERENCE_PROMPTS, REFERENCE_SEED = 256, 12345
PROMPTS = (4, 8, 16, 32, 64)
PROBES = (1, 2, 8, 32)
PAPER = (64, 8)  # N and R
SECONDS = 300.0  # of one call of ``measure``

Scores = dict[str, Tensor]  # module name -> [out, in]


def ranks(score: Tensor) -> Tensor:
    """Rank of each entry of a matrix, float64 ``[numel]``; equal entries in their order."""
    found = torch.empty(score.numel(), dtype=torch.float64)
    found[score.reshape(-1).sort(stable=True).indices] = torch.arange(score.numel(), dtype=torch.float64)
    return found


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation of two matrices."""
    return float(torch.corrcoef(torch.stack([ranks(first), ranks(second)]))[0, 1])


def hamming(first: Tensor, second: Tensor, rho: float) -> float:
    """Share of the bits in which the masks of the ``rho`` lowest scores differ."""
    return float((lowest(first, rho) != lowest(second, rho)).double().mean())


def first_prompts(statistics: ProbeStatistics, count: int) -> ProbeStatistics:
    """The statistics of the first ``count`` prompts."""
    return dataclasses.replace(
        statistics,
        activations={name: value[:count] for name, value in statistics.activations.items()},
        sensitivities={name: value[:count] for name, value in statistics.sensitivities.items()},
    )


def measure(pretraining_seed: int, seeds: list[int], cache: Path) -> list[Row]:
    """All rows of one base model."""
    model, tokenizer = load_base(pretraining_seed, cache)
    data = data_of(tokenizer, pretraining_seed, next(iter(STEPS)), cache)
    names = target_modules(model, None)
    reference = _probe(model, names, REFERENCE_SEED, data.upstream(REFERENCE_PROMPTS, REFERENCE_SEED), PAPER[1])
    truth = scores(model, reference, names)
    found = [
        {
            "pretraining_seed": pretraining_seed,
            "seed": seed,
            "source": source,
            "num_prompts": num_prompts,
            "num_probes": num_probes,
            "rho": RHO,
            "spearman": sum(spearman(score[name], truth[name]) for name in names) / len(names),
            "hamming": sum(hamming(score[name], truth[name], RHO) for name in names) / len(names),
            "matrices": len(names),
        }
        for seed in seeds
        for source, num_prompts, num_probes, score in _candidates(model, names, data, seed)
    ]
    return [{**row, **provenance()} for row in found]


def _candidates(model: nn.Module, names: list[str], data: Data, seed: int) -> Iterator[tuple[str, int, int, Scores]]:
    weights = {name: model.get_submodule(name).weight.detach().abs() for name in names}
    generator = torch.Generator().manual_seed(seed)
    yield "magnitude", 0, 0, weights
    yield "random", 0, 0, {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    for num_probes in PROBES:
        own = _probe(model, names, seed, None, num_probes)
        for num_prompts in PROMPTS:
            part = first_prompts(own, num_prompts)
            yield "synthetic", num_prompts, num_probes, scores(model, part, names)
        if num_probes == PAPER[1]:
            yield "without weight", *PAPER, scores(model, own, names, weight=False)
            activation = {name: own.activation(name).float().mean(0) for name in names}
            yield "wanda", *PAPER, {name: weight * activation[name] for name, weight in weights.items()}
    for source, batches in (
        ("random tokens", random_token_batches(data, seed)),
        ("real", data.upstream(PAPER[0], seed)),
    ):
        yield source, *PAPER, scores(model, _probe(model, names, seed, batches, PAPER[1]), names)


def _probe(model: nn.Module, names: list[str], seed: int, batches: list | None, num_probes: int) -> ProbeStatistics:
    return probe(model, batches=batches, num_probes=num_probes, target_modules=names, seed=seed, progress=False)
