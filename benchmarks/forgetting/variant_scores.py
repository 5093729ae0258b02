"""How far each variant of the score is from the paper's, how much it varies by itself, and what it costs.

Per weight matrix and averaged over matrices, at rho = 0.1: the Spearman correlation of a variant's score with the
paper's of the same prompts and sign vectors, and the Hamming distance of its masks to the paper's (share of mask bits
that differ; 0.18 for a random mask). "Self" is the Hamming distance of a variant's masks to its own of the next seed,
other prompts and sign vectors: a variant that is no farther from the paper's than that cannot be told from it. "Real"
and "images" are the Hamming distances to masks by the paper's score of as many real questions, of all the old tasks
and of those with an image. Seconds are of the score alone, beside those of the paper's in the same process; on a
shared machine they are good for a factor of two. One row a variant and seed:

    python -m benchmarks.forgetting.variant_scores          # about ten minutes on a core for each base model
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from torch import nn

from benchmarks.forgetting import rows as records
from benchmarks.forgetting.experiment import provenance
from benchmarks.forgetting.methods import Batch, Data, adapters, target_modules
from benchmarks.forgetting.methods.adapters import PROMPTS, Masks
from benchmarks.forgetting.methods.variants import VARIANTS, Score, Scores, Variant, each, paper
from benchmarks.forgetting.miniature import CACHE, STEPS, data_of, load_base
from benchmarks.forgetting.rows import Row
from benchmarks.forgetting.stability import REFERENCE_SEED, spearman
from dowser_peft import ProbeStatistics, probe
from dowser_peft.miniature import UPSTREAM

RESULTS = Path(__file__).parent / "results" / "variant-scores.jsonl"
RHO = 0.1
SEEDS = (0, 1, 2)
PER_TASK = 11  # questions: 66 of the six tasks with images
ALL = {"paper": Variant("Paper's score", paper), **VARIANTS}


def hamming(first: Masks, second: Masks) -> float:
    """Share of the bits that differ, mean over matrices."""
    return sum(float((first[name] != second[name]).double().mean()) for name in first) / len(first)


def real_masks(model: nn.Module, modules: list[str], data: Data) -> dict[str, Masks]:
    """Masks by the paper's score of real questions: of all the old tasks, and of those with images."""
    mixed = data.upstream(PROMPTS, REFERENCE_SEED)
    with_image = [
        batch for batch in data.upstream(PER_TASK * len(UPSTREAM), REFERENCE_SEED) if "pixel_values" in batch
    ]
    return {
        name: each(adapters.scores(model, _probe(model, modules, batches), modules), RHO)
        for name, batches in (("real", mixed), ("images", with_image))
    }


def _probe(model: nn.Module, modules: list[str], batches: list[Batch]) -> ProbeStatistics:
    return probe(model, batches=batches, target_modules=modules, seed=REFERENCE_SEED, progress=False)


def measure(pretraining_seed: int, names: list[str], cache: Path) -> Iterator[list[Row]]:
    """For each of the variants ``names`` its rows of all seeds, on one base model."""
    model, tokenizer = load_base(pretraining_seed, cache)
    data = data_of(tokenizer, pretraining_seed, next(iter(STEPS)), cache)
    modules = target_modules(model, None)
    references = real_masks(model, modules, data)
    scored: dict[tuple[Score, int], tuple[Scores, float]] = {}

    def timed(score: Score, seed: int) -> tuple[Scores, float]:
        if (score, seed) not in scored:
            started = time.perf_counter()
            found = score(model, modules, data, seed)
            scored[score, seed] = found, time.perf_counter() - started
        return scored[score, seed]

    for name in names:
        variant, rows = ALL[name], []
        for seed, following in zip(SEEDS, (*SEEDS[1:], SEEDS[0]), strict=True):
            expected, seconds_paper = timed(paper, seed)
            found, seconds = timed(variant.score, seed)
            masks = variant.select(found, RHO)
            distances = {
                "spearman": sum(spearman(found[module], expected[module]) for module in modules) / len(modules),
                "hamming": hamming(masks, ALL["paper"].select(expected, RHO)),
                "self": hamming(masks, variant.select(timed(variant.score, following)[0], RHO)),
                **{name: hamming(masks, reference) for name, reference in references.items()},
            }
            settings = {"pretraining_seed": pretraining_seed, "seed": seed, "variant": name, "rho": RHO}
            costs = {"seconds": round(seconds, 1), "seconds_paper": round(seconds_paper, 1)}
            rounded = {key: round(value, 4) for key, value in distances.items()}
            rows.append({**settings, **rounded, **costs, **provenance()})
        yield rows


def table(path: Path = RESULTS) -> str:
    """Markdown: means over seeds and base models."""
    frame = pd.DataFrame(records.read(path))
    frame["cost"] = frame["seconds"] / frame["seconds_paper"]
    means = frame.groupby("variant", sort=False)[["spearman", "hamming", "self", "real", "images", "cost"]].mean()
    lines = ["| | Spearman | Hamming | self | real | images | time, paper's = 1 |", "| --- |" + " ---: |" * 6]
    for name, (rank, *distances, cost) in zip(means.index, means.to_numpy(), strict=True):
        cells = [f"{rank:.3f}", *(f"{distance:.4f}" for distance in distances), f"{cost:.1f}"]
        lines.append(f"| {ALL[name].label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting.variant_scores", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--pretraining-seeds", type=int, nargs="+", default=[0], help="base models")
    parser.add_argument("--variants", nargs="+", choices=list(ALL), default=list(ALL), metavar="NAME", help="in order")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    for base in options.pretraining_seeds:
        done = {row["variant"] for row in records.read(options.results) if row["pretraining_seed"] == base}
        for rows in measure(base, [name for name in options.variants if name not in done], options.cache):
            records.append(rows, options.results)  # all seeds or none
    print(table(options.results))


if __name__ == "__main__":
    main()
