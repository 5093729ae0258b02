"""The picture of ``convergence.jsonl``: error over cost, and predicted over actual error; it only reads.

python -m benchmarks.speed.plot_convergence
"""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from benchmarks.speed.common import RESULTS, Row, latest, load_rows

COLOURS = {1: "#0b6e4f", 2: "#3a86c8", 4: "#c77d0a", 8: "#a4243b"}
MARKERS = "osD^"
TICKS = (0.02, 0.03, 0.05, 0.1, 0.2)


def draw(rows: list[Row]) -> plt.Figure:
    """One panel a model, and one for the prediction."""
    models = list(dict.fromkeys(row["configuration"]["model"] for row in rows))
    figure, panels = plt.subplots(
        1, len(models) + 1, figsize=(4.2 * (len(models) + 1), 3.9), layout="constrained", squeeze=False
    )
    prediction = panels[0, -1]
    for marker, model, axes in zip(MARKERS, models, panels[0], strict=False):
        of_model = [row for row in rows if row["configuration"]["model"] == model]
        for probes, colour in COLOURS.items():
            line = [row for row in of_model if row["num_probes"] == probes]
            axes.plot([row["cost_units"] for row in line], [row["median"] for row in line], "o-", color=colour, ms=4)
            prediction.scatter(
                [row["median"] for row in line], [row["predicted"] for row in line], 14, color=colour, marker=marker
            )
        for row in of_model:
            if (row["num_prompts"], row["num_probes"]) == (64, 8):
                axes.axhline(row["median"], color="grey", lw=0.8, ls=":")
                axes.annotate(
                    "the paper's (64, 8)", (row["cost_units"], row["median"]), fontsize=8, ha="left", va="bottom"
                )
        axes.set(xscale="log", yscale="log", title=model, xlabel="forward and backward passes of one prompt")
        axes.set_ylabel(f"mask error at rho = {of_model[0]['configuration']['rho']:g}")
    for probes, colour in COLOURS.items():
        panels[0, 0].plot([], [], "o-", color=colour, ms=4, label=f"R = {probes}")
    panels[0, 0].legend(frameon=False, fontsize=8)
    ends = [min(row["median"] for row in rows), max(row["median"] for row in rows)]
    prediction.plot(ends, ends, color="grey", lw=0.8)
    prediction.set(
        xscale="log", yscale="log", title="the estimate", xlabel="mask error, measured", ylabel="mask error, predicted"
    )
    for axes in (*panels[0], prediction.xaxis):
        axis = getattr(axes, "yaxis", axes)
        axis.set_major_locator(FixedLocator(TICKS))
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set_minor_locator(NullLocator())
    return figure


def main() -> None:
    figure = draw(latest(load_rows(RESULTS / "convergence.jsonl")))
    figure.savefig(RESULTS / "convergence.png", dpi=90)


if __name__ == "__main__":
    main()
