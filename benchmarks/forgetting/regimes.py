"""When do J and h matter? What the paper's score owes to |W|, h and J, and what remains when |W| is made to lie.

The logarithm of a matrix of scores, S = |W| F with F = Psi^T A, is a sum of four parts,

    log S_ij = log |W_ij| + J_i + h_j + e_ij,

of which J_i and h_j are the row and column means of log F, and e_ij what no product of a row and a column explains.
The share of a part x is Cov(x, log S) / Var(log S); the four sum to one, and a share is negative where a part works
against the others. What |W| explains without the others is the squared correlation of log |W| and log S: where |W|
and J, or |W| and h, have large parts that cancel, it falls although the shares stay. Beside them, the share of the
weights that S trains at rho = 0.1 which another score trains too (0.1 by chance): |W| alone, Wanda's |W| |h|, and
J |W| without h.

All this on the base model as it is, and transformed as transforms.py says: the same function, with weights of which
|W| says less and less. One row a matrix, of a transformed model only those matrices that the transform changes:

    python -m benchmarks.forgetting.regimes             # two minutes on a core for each base model
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.forgetting import rows as records
from benchmarks.forgetting.experiment import provenance
from benchmarks.forgetting.methods import target_modules
from benchmarks.forgetting.methods.adapters import lowest
from benchmarks.forgetting.miniature import CACHE, load_base
from benchmarks.forgetting.rows import Row
from benchmarks.forgetting.transforms import apply, copying, rescaling
from dowser_peft import ProbeStatistics, probe

RESULTS = Path(__file__).parent / "results" / "regimes.jsonl"
TRANSFORMS = (None, rescaling(1), rescaling(2), rescaling(3), copying(4))
RHO = 0.1
PARTS = ("weight", "sensitivity", "activation", "interaction")
ALONE = "weight alone"
OTHERS = ("magnitude", "wanda", "without h")


def shares(weight: Tensor, factor: Tensor) -> dict[str, float]:
    """Share of each part of ``log (|weight| * factor)`` in its variance, and what |W| explains alone; entries that are
    zero are left out.

    Args:
        weight: ``[out, in]``.
        factor: F, ``[out, in]``, not negative.
    """
    weight, factor = weight.double().abs(), factor.double()
    present = (weight > 0) & (factor > 0)
    logarithm = torch.where(present, factor, 1.0).log()
    row = logarithm.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1)
    column = (torch.where(present, logarithm - row, 0.0)).sum(0) / present.sum(0).clamp(min=1)
    parts = [torch.where(present, weight, 1.0).log(), row.expand_as(factor), column.expand_as(factor)]
    parts.append(logarithm - row - column)
    values = torch.stack([part[present] for part in parts])
    values -= values.mean(1, keepdim=True)
    total = values.sum(0)
    covariance = values @ total
    alone = covariance[0] ** 2 / (values[0] @ values[0] * (total @ total))  # not a number if all |W| are equal
    return dict(zip(PARTS, (covariance / (total @ total)).tolist(), strict=True)) | {ALONE: float(alone.nan_to_num())}


def overlap(first: Tensor, second: Tensor, rho: float) -> float:
    """Share of the ``rho`` lowest entries of ``first`` that are among those of ``second``."""
    mask = lowest(first, rho)
    return float((mask & lowest(second, rho)).sum() / mask.sum())


def of_matrix(weight: Tensor, statistics: ProbeStatistics, name: str) -> dict[str, float]:
    """Shares of a matrix, and overlaps with other scores."""
    activation, sensitivity = statistics.activation(name).float(), statistics.sensitivity(name).float()
    factor, magnitude = sensitivity.T @ activation, weight.detach().abs()
    others = (magnitude, magnitude * activation.mean(0), magnitude * sensitivity.mean(0)[:, None])
    score = magnitude * factor
    overlaps = [overlap(score, other, RHO) for other in others]
    return shares(weight, factor) | dict(zip(OTHERS, overlaps, strict=True))


def measure(pretraining_seed: int, transform: str | None, seed: int, cache: Path) -> Iterator[Row]:
    """All rows of one base model, transformed."""
    base, _ = load_base(pretraining_seed, cache)
    names = target_modules(base, None)
    model = apply(copy.deepcopy(base), transform)
    statistics = probe(model, target_modules=names, seed=seed, progress=False)
    for name in names:
        weight = _weight(model, name)
        if transform and torch.equal(weight, _weight(base, name)):
            continue
        origin = {"pretraining_seed": pretraining_seed, "seed": seed, "transform": transform, "module": name}
        found = {key: round(value, 4) for key, value in of_matrix(weight, statistics, name).items()}
        yield {**origin, "rho": RHO, **found, **provenance()}


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").detach()


def table(path: Path = RESULTS) -> str:
    """Markdown: means over decoder layers and base models, one line for each projection and transform."""
    frame = pd.DataFrame(records.read(path)).fillna({"transform": ""})
    frame["projection"] = frame["module"].str.rpartition(".")[2]
    means = frame.groupby(["projection", "transform"], sort=False)[[*PARTS, ALONE, *OTHERS]].mean()
    size = r"\|W\|"  # in a table
    header = ["", "transform", f"share of {size}", "of J", "of h", "of J and h together", f"{size} alone explains"]
    header += [f"also trained by {size}", "by Wanda", f"by J {size}"]
    lines = [
        [projection, transform, *(f"{value:.2f}" for value in values)]
        for (projection, transform), values in zip(means.index, means.to_numpy(), strict=True)
    ]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *lines])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting.regimes", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--pretraining-seeds", type=int, nargs="+", default=[0], help="base models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    done = {(row["pretraining_seed"], row["transform"]) for row in records.read(options.results)}
    for base, transform in itertools.product(options.pretraining_seeds, TRANSFORMS):
        if (base, transform) not in done:
            records.append(list(measure(base, transform, 0, options.cache)), options.results)  # all or none
    print(table(options.results))


if __name__ == "__main__":
    main()
