"""Figures of the forgetting benchmark. They read rows and measure nothing."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.forgetting.curves import at_chosen_rate, at_first_rate, curve
from benchmarks.forgetting.methods import METHODS, TITLES
from benchmarks.forgetting.protocol import DEPTHS, IN_DEPTH, IN_RHO, RHO, RHOS
from dowser_peft.miniature import UPSTREAM

# Dowser stands out; related methods have related colours.
COLOURS = {
    "zero-shot": "#111827",
    "full": "#6b7280",
    "grafting": "#93c5fd",
    "dare": "#60a5fa",
    "tailor": "#2563eb",
    "half-way": "#1e3a8a",
    "spider": "#a16207",
    "dowser": "#dc2626",
    "lora": "#16a34a",
    "shira": "#86efac",
    "super-top": "#d8b4fe",
    "super-bottom": "#9333ea",
    "osf": "#0d9488",
    "dowser-decay-3": "#fb7185",
    "dowser-column": "#f97316",
    "magnitude-column": "#c084fc",
    "wanda-column": "#fbbf24",
    "random-column": "#bbf7d0",
    "wanda": "#eab308",
    "random": "#22c55e",
    "highest": "#000000",
}
OTHER = "#9ca3af"
SPARE = ["#0ea5e9", "#84cc16", "#ec4899", "#78350f", "#6366f1", "#14b8a6", "#f59e0b", "#94a3b8", "#be123c", "#4d7c0f"]
SPARE += ["#7e22ce", "#0f766e"]
SHOWN_FROM = 40.0
RADAR = ["zero-shot", "full", "tailor", "spider", "lora", "dowser", "dowser-decay-3"]
LAYERS = 8


def pareto(runs: pd.DataFrame, task: str) -> Figure:
    """Upstream against downstream: a line for the sweep on the first base model, a cross for the chosen rate, mean and
    standard deviation over base models and seeds. What learns or keeps less than ``SHOWN_FROM`` is cut off."""
    present = set(runs.loc[runs["task"] == task, "method"]) & set(METHODS) - {"zero-shot"}
    groups = [group for group in TITLES if any(METHODS[name].group == group for name in present)]
    columns = min(3, max(1, len(groups)))
    lines = math.ceil(max(1, len(groups)) / columns)
    figure = Figure(figsize=(4.6 * columns, 4.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    figure.suptitle(
        "Lines: the first base model at every rate. Crosses: the chosen rate, all base models.", fontsize=9
    )
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    for axes, group in zip(panels, groups, strict=False):
        spare = itertools.cycle(SPARE)  # for those without a colour of their own
        for name in [name for name in METHODS if METHODS[name].group == group or name in ("full", "dowser")]:
            found = curve(runs, name, task)
            if METHODS[name].rates and len(found):
                _pareto_line(axes, found, name, COLOURS.get(name) or next(spare))
        _finish(axes, f"{TITLES[group]}: {task}", "downstream [%]", "upstream average [%]")
        axes.set(xlim=(SHOWN_FROM, 101), ylim=(SHOWN_FROM, 101))
        axes.tick_params(labelbottom=True)
        axes.legend(fontsize=7, frameon=False, loc="lower left")
    return figure


def _pareto_line(axes: Axes, runs: pd.DataFrame, name: str, colour: str) -> None:
    first = runs[(runs["seed"] == runs["seed"].min()) & (runs["pretraining_seed"] == runs["pretraining_seed"].min())]
    first = first.sort_values("lr")
    style = {"color": colour, "linewidth": 2.2 if name == "dowser" else 1.2}
    axes.plot(first["downstream"], first["upstream"], marker="o", markersize=3, label=METHODS[name].label, **style)
    chosen = at_chosen_rate(runs)[["downstream", "upstream"]]
    x, y = chosen.mean()
    x_spread, y_spread = chosen.std().fillna(0.0)
    axes.errorbar(x, y, y_spread, x_spread, color=colour, marker="s", markersize=6, markeredgecolor="white", zorder=3)


def depth(runs: pd.DataFrame, task: str) -> Figure:
    """H-score and upstream average by depth, counted from the output; of methods with more than one depth."""
    return _lines(
        runs, task, IN_DEPTH, [(layers, RHO, layers) for layers in DEPTHS] + [(LAYERS, RHO, None)], "last layers"
    )


def rho(runs: pd.DataFrame, task: str) -> Figure:
    """H-score and upstream average by the share of weights that change; at 1 stands full fine-tuning."""
    figure = _lines(runs, task, IN_RHO, [(share, share, None) for share in sorted([*RHOS, RHO])], "rho")
    full = at_first_rate(curve(runs, "full", task))
    for axes, column in zip(figure.axes, ("upstream", "h"), strict=False):
        axes.set_xscale("log")
        if len(full):
            axes.scatter([1.0], [full[column].mean()], color=_colour("full"), label=METHODS["full"].label, zorder=3)
    figure.axes[0].legend(fontsize=7, frameon=False)
    return figure


def _lines(
    runs: pd.DataFrame, task: str, methods: list[str], settings: list[tuple[float, float, int | None]], label: str
) -> Figure:
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (column, title) in zip(panels, (("upstream", "Upstream average"), ("h", "H-score")), strict=True):
        for name in methods:
            parts = [
                (x, at_first_rate(curve(runs, name, task, rho=share, depth=layers))) for x, share, layers in settings
            ]
            points = [(x, part[column].mean(), part[column].std()) for x, part in parts if len(part)]
            if len(points) > 1:
                x, mean, spread = zip(*points, strict=True)
                spread = [0.0 if math.isnan(value) else value for value in spread]
                width = 2.4 if name == "dowser" else 1.2
                axes.errorbar(
                    x, mean, spread, color=_colour(name), label=METHODS[name].label, linewidth=width, capsize=2
                )
        _finish(axes, f"{title}: {task}", label, "[%]")
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def radar(runs: pd.DataFrame, task: str) -> Figure:
    """Every old task and the new one, in percent, at the chosen rates."""
    names = [*(name for name in UPSTREAM), task]
    angles = [2 * math.pi * index / len(names) for index in range(len(names))]
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.add_subplot(projection="polar")
    for method in RADAR:
        chosen = at_chosen_rate(curve(runs, method, task))
        if chosen.empty:
            continue
        values = [chosen[f"task:{name}"].fillna(0).mean() for name in names]
        width = 2.4 if method == "dowser" else 1.2
        axes.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            color=_colour(method),
            label=METHODS[method].label,
            linewidth=width,
        )
    axes.set_xticks(angles, [*UPSTREAM, f"{task} (new)"], fontsize=8)
    axes.set_ylim(0, 100)
    axes.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.25, -0.08))
    return figure


def stability(found: pd.DataFrame) -> Figure:
    """Spearman and Hamming to real-data scores by N, one line for each R; without a probe as level lines."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, column in zip(panels, ("spearman", "hamming"), strict=True):
        own = found[found["source"] == "synthetic"]
        for probes, part in own.groupby("num_probes"):
            spread = part.groupby("num_prompts")[column].agg(["mean", "std"]).fillna(0.0)
            axes.errorbar(spread.index, spread["mean"], spread["std"], label=f"synthetic, R={probes}", capsize=2)
        for source, style in (("magnitude", "--"), ("wanda", ":"), ("random tokens", "-."), ("real", "-")):
            level = found.loc[found["source"] == source, column]
            if len(level):
                axes.axhline(
                    level.mean(), linestyle=style, color=OTHER, label="|W| alone" if source == "magnitude" else source
                )
        axes.set_xscale("log", base=2)
        _finish(axes, f"{column.capitalize()} to the real-data score", "N, prompts", "")
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_all(runs: pd.DataFrame, stable: pd.DataFrame | None, folder: Path) -> list[Path]:
    """Draw every figure that has rows; returns their files."""
    drawn: dict[str, Figure] = {}
    for task in runs["task"].unique():
        drawn[f"pareto-{task}"] = pareto(runs, task)
        drawn[f"radar-{task}"] = radar(runs, task)
    varied = {"depth": runs["depth"].notna(), "rho": runs["rho"].notna() & (runs["rho"] != RHO)}
    for name, draw in (("depth", depth), ("rho", rho)):
        for task in runs.loc[varied[name], "task"].unique():
            drawn[f"{name}-{task}"] = draw(runs, task)
    if stable is not None:
        drawn["stability"] = stability(stable)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths
