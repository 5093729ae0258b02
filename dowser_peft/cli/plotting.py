"""The figures of ``dowser-peft inspect --plot``. Matplotlib is imported here only, and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dowser_peft.cli.naming import Place

if TYPE_CHECKING:
    from dowser_peft.cli.adapter_report import AdapterRow
    from dowser_peft.cli.statistics_report import StatisticsRow

_INK, _GREY, _ABSENT = "#1f2933", "#7b8794", "#eef0f2"
_TRAINED, _FROZEN = "#2a9d8f", "#b8c4ce"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.linewidth": 0.8,
}


def check_plot(path: Path) -> None:
    """Refuse a figure that could not be written, before anything is computed.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the ending of ``path`` is not one of an image.
        OSError: if its folder does not exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError('--plot needs matplotlib: pip install "dowser-peft[demo]"') from error
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in kinds:
        raise ValueError(f"--plot {str(path)!r}: the name must end in one of {', '.join(sorted(kinds))}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--plot {str(path)!r}: there is no folder to write it to")


@dataclass(frozen=True)
class _Panel:
    """One heatmap: ``value`` of each module, on a scale that is logarithmic if it spans much."""

    heading: str
    unit: str
    value: Callable[[Any], float]
    may_be_logarithmic: bool = True
    limits: tuple[float, float] | None = None


def plot_adapter(rows: list[AdapterRow], title: str, path: Path) -> None:
    """How far each module moved, and how its mask is spread: two or three heatmaps, layers x modules."""
    panels = [_Panel("How far the weights moved", "root mean square of the trained deltas", lambda row: row.rms)]
    spreads = [value for row in rows for value in (row.in_fullest_rows, row.in_fullest_columns) if value is not None]
    if len(spreads) == 2 * len(rows):
        limits = (10.0, max(20.0, 100 * max(spreads)))
        panels += [
            _Panel(
                "Mask: concentration in outputs",
                "% of the mask in the fullest 10 % of rows",
                lambda row: 100 * row.in_fullest_rows,
                False,
                limits,
            ),
            _Panel(
                "Mask: concentration in inputs",
                "% of the mask in the fullest 10 % of columns",
                lambda row: 100 * row.in_fullest_columns,
                False,
                limits,
            ),
        ]
    elif all(row.rho is not None for row in rows):
        panels.append(_Panel("Density", "trained weights [% of the module]", lambda row: 100 * row.rho, False))
    else:
        panels.append(_Panel("Trained columns", "number of input columns", lambda row: row.columns, False))
    _draw(rows, panels, title, path)


def plot_statistics(rows: list[StatisticsRow], title: str, rho: float, path: Path) -> None:
    """Where importance lies: its two factors, or with scores the scores and their cut."""
    if any(row.scores is None for row in rows):
        panels = [
            _Panel("Activation |h|", "median over the inputs", lambda row: row.activation["median"]),
            _Panel("Sensitivity ψ", "median over the outputs", lambda row: row.sensitivity["median"]),
        ]
        _draw(rows, panels, title, path)
        return
    panels = [_Panel("Importance S", "median score of a weight", lambda row: row.scores.quantiles["median"])]
    _draw(rows, panels, title, path, beside=lambda axes: _draw_scores(axes, rows, rho))


def _draw(
    rows: Sequence[Any],
    panels: list[_Panel],
    title: str,
    path: Path,
    beside: Callable[[Any], None] | None = None,
) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layers, modules = _axis([row.place.layer for row in rows]), _axis([row.place.module for row in rows])
    map_width = min(10.0, max(3.6, 1.9 + 0.34 * len(modules)))
    widths = [map_width] * len(panels) + ([5.2] if beside else [])
    height = min(11.0, max(3.9, 1.9 + 0.13 * len(layers)))
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        figure = Figure(figsize=(sum(widths) + 0.4, height), layout=layout, facecolor="white")
        grid = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=False):
            cells = _cells([(row.place, panel.value(row)) for row in rows], layers, modules)
            _draw_heatmap(figure, axes, panel, cells, layers, modules)
            axes.set_ylabel("layer" if axes is grid[0] else "")
        if beside is not None:
            beside(grid[-1])
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        figure.savefig(path, dpi=160)


def _axis(labels: list[str]) -> list[str]:
    return list(dict.fromkeys(labels))


def _cells(values: list[tuple[Place, float]], layers: list[str], modules: list[str]) -> np.ndarray:
    cells = np.full((len(layers), len(modules)), np.nan)
    for place, value in values:
        cells[layers.index(place.layer), modules.index(place.module)] = value
    return cells


def _draw_heatmap(
    figure: Any, axes: Any, panel: _Panel, cells: np.ndarray, layers: list[str], modules: list[str]
) -> None:
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    known = cells[np.isfinite(cells) & ((cells > 0) | (not panel.may_be_logarithmic))]
    low, high = panel.limits or ((float(known.min()), float(known.max())) if known.size else (0.0, 1.0))
    if low == high:
        low, high = low * 0.9, high * 1.1 or 1.0
    is_logarithmic = panel.may_be_logarithmic and high > 8 * low > 0
    colours = matplotlib.colormaps["viridis"].copy()
    colours.set_bad(_ABSENT)
    shown = np.where(cells > 0, cells, np.nan) if is_logarithmic else cells
    image = axes.imshow(
        shown, aspect="auto", cmap=colours, norm=LogNorm(low, high) if is_logarithmic else Normalize(low, high)
    )
    axes.set_title(panel.heading, loc="left", pad=8)
    axes.set_xticks(range(len(modules)), modules, rotation=45, ha="right", rotation_mode="anchor")
    step = max(1, -(-len(layers) // 24))
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(np.arange(len(modules) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(layers) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.03, aspect=28)
    bar.set_label(panel.unit)
    bar.outline.set_visible(False)


def _draw_scores(axes: Any, rows: Sequence[StatisticsRow], rho: float) -> None:
    """The distribution of all scores, each divided by the cut of its own layer, so that all cuts meet at 1."""
    from dowser_peft.cli.statistics_report import HISTOGRAM_EDGES

    counts = sum(row.scores.histogram for row in rows if row.scores is not None)
    share = 100 * counts / max(1, counts.sum())  # type: ignore[union-attr]
    ratio = 10.0**HISTOGRAM_EDGES
    trained = ratio[:-1] < 1
    axes.stairs(np.where(trained, share, 0), ratio, fill=True, color=_TRAINED)
    axes.stairs(np.where(trained, 0, share), ratio, fill=True, color=_FROZEN)
    axes.axvline(1, color=_INK, linewidth=1, linestyle=(0, (4, 2)))
    axes.set_xscale("log")
    seen = np.flatnonzero(share > 0.002)
    if seen.size:  # not if all scores are zero
        axes.set_xlim(ratio[seen[0]], ratio[seen[-1] + 1] * 1.5)
    top = float(share.max()) * 1.22 or 1.0
    axes.set_ylim(0, top)
    axes.set_title("Scores around the cut", loc="left", pad=8)
    axes.set_xlabel("score / cut of its layer")
    per_decade = round(1 / (HISTOGRAM_EDGES[1] - HISTOGRAM_EDGES[0]))
    axes.set_ylabel(f"weights [%] per bin of 1/{per_decade} decade")
    axes.text(0.9, top * 0.96, f"trains: {100 * rho:g} %", color=_TRAINED, ha="right", va="top", weight="bold")
    axes.text(1.12, top * 0.96, f"frozen: {100 * (1 - rho):g} %", color=_GREY, ha="left", va="top", weight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
