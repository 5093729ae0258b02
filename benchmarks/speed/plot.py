"""Step time and memory against model size, log-log, with fitted exponents; it only reads rows.

Over rho, where nothing grows, the step time is that of the dense floor of the same cell: cells are measured at
different hours of a shared machine.

python -m benchmarks.speed.plot
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.speed.common import RESULTS, Row, latest, load_rows
from benchmarks.speed.step import ACTIVATION_FREE, RHO
from benchmarks.speed.tables import TOKENS

FLOOR = "dense floor"
SHOWN = {  # method -> colour: ours in red, what it is compared with in greys and blues
    FLOOR: "0.6",
    "masked full fine-tuning": "0.15",
    "PEFT SHiRA": "tab:blue",
    "PEFT Super-Tuning": "tab:cyan",
    "LoRA, same count": "tab:green",
    "Dowser": "tab:red",
    "Dowser column": "tab:orange",
}


Point = tuple[float, ...]  # x, median, q20, q80


def exponent(x: Iterable[float], y: Iterable[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    return float(np.polyfit(np.log(list(x)), np.log(list(y)), 1)[0])


def growth(rows: Iterable[Row], part: str, method: str, axis: str, **fixed: object) -> list[Point]:
    """(x, median, q20, q80) over the values of one entry of the configuration, the others as in ``fixed``."""
    fixed = {"rho": RHO, "nf4": False, "checkpointing": False} | fixed | {"part": part}
    fixed.pop(axis, None)
    return sorted(
        (row["configuration"][axis], row["median"], row["q20"], row["q80"])
        for row in rows
        if row["method"] == method and all(row["configuration"][key] == value for key, value in fixed.items())
    )


def draw(rows: list[Row], path: Path) -> None:
    """One machine: time and memory against size, time against tokens and against rho, as far as they were varied."""
    tokens = TOKENS[rows[0]["device"]]
    middle = _most_measured(rows)
    name = f"{middle['shape']} weights"
    time, memory = "step time [ms]", "peak memory [bytes]"
    panels: list[tuple[str, str, dict[str, object], str, str]] = [
        ("training", "weights", {"tokens": tokens}, time, f"{tokens} tokens"),
        ("memory", "weights", {"tokens": ACTIVATION_FREE}, memory, "without activations"),
        ("training", "tokens", middle, time, name),
        ("training", "rho", {**middle, "tokens": tokens}, f"step time, {FLOOR} = 1", f"{name}, {tokens} tokens"),
    ]
    drawn = [
        ({method: growth(rows, part, method, axis, **fixed) for method in SHOWN}, axis, y_label, title)
        for part, axis, fixed, y_label, title in panels
    ]
    if drawn[-1][0][FLOOR]:
        drawn[-1] = (_by_floor(drawn[-1][0]), *drawn[-1][1:])
    drawn = [panel for panel in drawn if any(len(points) > 1 for points in panel[0].values())] or drawn[:1]
    figure, axes = plt.subplots(1, len(drawn), figsize=(4 * len(drawn), 5.2), layout="constrained", squeeze=False)
    for ax, (lines, axis, y_label, title) in zip(axes[0], drawn, strict=True):
        for method, colour in SHOWN.items():
            _line(ax, lines[method], method, colour)
        x_label = "target weights" if axis == "weights" else axis
        ax.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=title)
        _ticks_where_measured(ax, lines.values())
        ax.grid(alpha=0.3, which="both", linewidth=0.5)
        ax.legend(
            fontsize=7, title="fitted exponent", title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14)
        )
    figure.suptitle(f"One training step, {rows[0]['device_name']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _by_floor(lines: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """Every point divided by the dense floor at the same x."""
    floor = {point[0]: point[1] for point in lines[FLOOR]}
    return {
        method: [(x, *(value / floor[x] for value in values)) for x, *values in points if x in floor]
        for method, points in lines.items()
    }


def _line(ax: Axes, points: list[Point], label: str, colour: str) -> None:
    if not points:
        return
    x, median, q20, q80 = np.array(points).T
    label = f"{label}: {exponent(x, median):.2f}" if len(points) > 1 else label
    ax.errorbar(x, median, yerr=[median - q20, q80 - median], label=label, color=colour, marker="o", ms=3, lw=1)


def _ticks_where_measured(ax: Axes, lines: Iterable[list[Point]]) -> None:
    measured = sorted({point[0] for points in lines for point in points})
    ax.set_xticks(measured, [f"{x / 1e6:.0f}M" if x >= 1e6 else f"{x:g}" for x in measured])
    ax.set_xticks([], minor=True)


def _most_measured(rows: list[Row]) -> dict[str, object]:
    """Shape and layers of the model with the most cells: the one that length and rho were varied on."""
    cells = {json.dumps(row["configuration"], sort_keys=True) for row in rows}
    models = [(configuration["shape"], configuration["layers"]) for configuration in map(json.loads, cells)]
    shape, layers = max(sorted(set(models), key=str), key=models.count)
    return {"shape": shape, "layers": layers}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "step.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the figures step-cpu.png, step-cuda.png")
    options = parser.parse_args(arguments)
    rows = [row for row in latest(load_rows(options.rows)) if row["suite"] == "step"]
    for device in sorted({row["device"] for row in rows}):
        draw([row for row in rows if row["device"] == device], options.out / f"step-{device}.png")


if __name__ == "__main__":
    main()
