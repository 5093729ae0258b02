"""README's table of the demo task, from the rows of the sweep; it only reads.

python -m benchmarks.forgetting.tables
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from dowser_peft.miniature import UPSTREAM

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"


def load_runs(path: Path = RESULTS) -> pd.DataFrame:
    """One row a run: new-task accuracy, average of the old tasks and H-score, of test and of validation."""
    rows = [_flat(json.loads(line)) for line in path.read_text().splitlines()]
    return pd.DataFrame(rows)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {name: row[name] for name in ("task", "method", "lr", "seed", "trained_parameters")}
    for split in ("test", "validation"):
        new, kept = row[split][row["task"]], sum(row[split][task] for task in UPSTREAM) / len(UPSTREAM)
        flat |= {f"{split}_new": new, f"{split}_kept": kept}
        flat[f"{split}_h"] = 2 * new * kept / (new + kept) if new + kept else 0.0
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
