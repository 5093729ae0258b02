"""Rows as a table, and what is read off it: a method's curve over its rates, and where on it the method stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pandas as pd

from benchmarks.forgetting import rows as records
from benchmarks.forgetting.protocol import ITEMS, MATCHED, Case
from benchmarks.forgetting.rows import OK, Row


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line a run: its settings, ``downstream``, ``upstream`` and ``h`` of the test questions, the same with
    ``validation_``, and the test accuracy of every task as ``task:NAME``. Runs that diverged have zero scores."""
    lines = []
    for row in rows:
        if row["status"] == records.FAILED:
            continue
        line = dataclasses.asdict(records.run_of(row))
        for split, prefix in (("test", ""), ("validation", "validation_")):
            scores = row[split] if row["status"] == OK else {row["task"]: 0.0, "none": 0.0}
            line |= {prefix + name: value for name, value in records.summary(scores, row["task"]).items()}
        if row["status"] == OK:
            line |= {f"task:{name}": value for name, value in row["test"].items()}
        lines.append(line)
    return pd.DataFrame(lines, columns=None if lines else [*records.KEYS, "downstream", "upstream", "h"])


def curve(runs: pd.DataFrame, method: str, task: str, items: int = ITEMS, **settings: Any) -> pd.DataFrame:
    """The runs of one :class:`~benchmarks.forgetting.protocol.Case`, ``settings`` being its other fields."""
    wanted = dataclasses.asdict(Case(method, task, items, **settings).run(None, 0, 0))
    for key in [key for key in records.KEYS if key not in ("pretraining_seed", "lr", "seed")]:
        runs = runs[runs[key].isna() if wanted[key] is None else runs[key] == wanted[key]]
    return runs


def at_chosen_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of one curve at its chosen rate, of those tried on the most base models; ties go to the lower."""
    if runs.empty or runs["lr"].isna().all():
        return runs
    first = runs[runs["seed"] == runs["seed"].min()]
    by_rate = first.groupby("lr").agg(bases=("pretraining_seed", "nunique"), h=("validation_h", "mean"))
    by_rate = by_rate[by_rate["bases"] == by_rate["bases"].max()]
    return runs[runs["lr"] == by_rate["h"].idxmax()]


def at_first_rate(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of one curve, at the first fine-tuning seed, at the best rate of the first base model; ties go to the
    lower. Other base models may have this rate alone."""
    if runs.empty or runs["lr"].isna().all():
        return runs
    runs = runs[runs["seed"] == runs["seed"].min()]
    first = runs[runs["pretraining_seed"] == runs["pretraining_seed"].min()]
    return runs[runs["lr"] == first.set_index("lr")["validation_h"].sort_index().idxmax()]


def upstream_at(runs: pd.DataFrame, downstream: float) -> float | None:
    """The highest upstream average that one sweep (one base model, one seed) reaches at ``downstream`` or more.

    Candidates are its runs and, between runs at neighbouring rates of which only one is good enough, the point of
    the connecting line that is just good enough. None if no run is.
    """
    points = runs.sort_values("lr")[["downstream", "upstream"]].to_numpy()
    reached = [upstream for learned, upstream in points if learned >= downstream]
    for (learned, kept), (learned_next, kept_next) in zip(points, points[1:], strict=False):
        if (learned >= downstream) != (learned_next >= downstream):
            share = (downstream - learned) / (learned_next - learned)
            reached.append(kept + share * (kept_next - kept))
    return max(reached, default=None)


def matched(runs: pd.DataFrame, downstream: float = MATCHED) -> pd.Series:
    """:func:`upstream_at` of every base model, at the first fine-tuning seed, on which the lowest rate learned less
    and some rate at least as much."""
    if runs.empty:
        return pd.Series(dtype=float)
    first = runs[runs["seed"] == runs["seed"].min()]
    found = {
        base: upstream_at(part, downstream)
        for base, part in first.groupby("pretraining_seed")
        if part.loc[part["lr"].idxmin(), "downstream"] < downstream
    }
    return pd.Series(found, dtype=float).dropna()


def beyond(runs: pd.DataFrame, reference: pd.DataFrame) -> pd.Series:
    """H-scores less those of ``reference`` with the same base model and seed: what the base models share drops out."""
    first, second = (part.set_index(["pretraining_seed", "seed"])["h"] for part in (runs, reference))
    return (first - second).dropna()
