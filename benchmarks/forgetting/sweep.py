"""Each method over a grid of learning rates, on one downstream task of the miniature, with several seeds.

    python -m benchmarks.forgetting.sweep --task style --seeds 0 1 2

Which rate is a method's best is decided on other questions ("validation") than those that are reported ("test").
One JSON line a run in ``results/sweep.jsonl``; runs whose line is there are skipped, so a killed sweep goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.forgetting import rows
from benchmarks.forgetting.experiment import provenance
from benchmarks.forgetting.miniature import STEPS, TEST, VALIDATION
from benchmarks.forgetting.rows import Row
from dowser_peft.miniature import DOWNSTREAM, UPSTREAM, evaluate, fine_tune, load_miniature
from dowser_peft.miniature.methods import METHODS

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"
GRID = {
    "full fine-tuning": [5e-5, 1e-4, 2e-4, 3e-4],
    "LoRA r=8": [2e-4, 3e-4, 5e-4, 1e-3, 2e-3],
    "Dowser": [5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3],
    "Dowser, weight decay 10": [2e-3, 4e-3, 8e-3, 1.6e-2],
}
KEY = ("task", "method", "lr", "seed", "steps", "rho", "items")


def settings_of(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def run(task: str, method: str, lr: float, seed: int, steps: int, rho: float, items: int) -> Row:
    """One fine-tuning run: what was learned and what was kept, in percent answered exactly."""
    torch.manual_seed(seed)
    model, tokenizer = load_miniature()
    tuned = METHODS[method].wrap(model, rho, seed)
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    started = time.perf_counter()
    decay = METHODS[method].weight_decay
    losses = fine_tune(tuned, tokenizer, task, steps=steps, lr=lr, seed=seed, weight_decay=decay)
    seconds = time.perf_counter() - started
    scores = {
        split: evaluate(tuned, tokenizer, [*UPSTREAM, task], items=items, seed=questions)
        for split, questions in (("test", TEST), ("validation", VALIDATION))
    }
    return {
        **dict(zip(KEY, (task, method, lr, seed, steps, rho, items), strict=True)),
        **scores,
        "final_loss": sum(losses[-10:]) / len(losses[-10:]),
        "trained_parameters": trained,
        "seconds": round(seconds, 1),
        **provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=DOWNSTREAM, default="style")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--items", type=int, default=100, help="questions per task")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = {settings_of(row) for row in rows.read(RESULTS, settings_of)}
    wanted = [
        (options.task, method, lr, seed, STEPS[options.task], options.rho, options.items)
        for seed in options.seeds
        for method, rates in GRID.items()
        for lr in rates
    ]
    for settings in tqdm([settings for settings in wanted if settings not in done], unit="run"):
        rows.append([run(*settings)], RESULTS)


if __name__ == "__main__":
    main()
