"""README's table of the demo task, from the rows of the sweep; it only reads.

python -m benchmarks.forgetting.tables
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.forgetting import rows
from benchmarks.forgetting.rows import Row
from benchmarks.forgetting.sweep import RESULTS, settings_of


def load_runs(path: Path = RESULTS) -> pd.DataFrame:
    """One row a run: new-task accuracy, average of the old tasks and H-score, of test and of validation."""
    return pd.DataFrame([_flat(row) for row in rows.read(path, settings_of)])


def _flat(row: Row) -> Row:
    flat = {name: row[name] for name in ("task", "method", "lr", "seed", "trained_parameters")}
    for split in ("test", "validation"):
        found = rows.summary(row[split], row["task"])
        flat |= {f"{split}_new": found["downstream"], f"{split}_kept": found["upstream"], f"{split}_h": found["h"]}
    return flat


def best_rates(runs: pd.DataFrame) -> dict[str, float]:
    """The learning rate of each method with the highest mean H-score on the validation questions."""
    means = runs.groupby(["method", "lr"], sort=False)["validation_h"].mean()
    return {method: means[method].idxmax() for method in runs["method"].unique()}


def table(task: str) -> str:
    """Markdown: each method at its best rate, mean ± standard deviation over seeds."""
    runs = load_runs()
    runs = runs[runs["task"] == task]
    lines = [
        "| | learning rate | new task | old tasks | H-score | trained weights |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, lr in best_rates(runs).items():
        chosen = runs[(runs["method"] == method) & (runs["lr"] == lr)]
        cells = [
            f"{chosen[name].mean():.1f} ± {chosen[name].std():.1f}" for name in ("test_new", "test_kept", "test_h")
        ]
        trained = chosen["trained_parameters"].iloc[0]
        lines.append(f"| {method} | {lr:g} | {' | '.join(cells)} | {trained:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in load_runs()["task"].unique():
        print(f"{name}\n\n{table(name)}\n")
