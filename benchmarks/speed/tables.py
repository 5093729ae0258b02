"""The tables of speed and memory in README.md and in README.md beside this file, from the committed rows.

    python -m benchmarks.speed.tables            # print
    python -m benchmarks.speed.tables --write    # and put them between the markers

Every ratio is taken within one cell (one process, one model, methods interleaved), round by round: the median over
the rounds of the quotient of two samples that were taken one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.pages import write_section
from benchmarks.speed import accounting
from benchmarks.speed.common import RESULTS, ROOT, Row, latest, load_rows, quantiles
from benchmarks.speed.peers import METHODS
from benchmarks.speed.step import ACTIVATION_FREE, GEMMS, RHO

README, DETAILS = ROOT / "README.md", Path(__file__).parent / "README.md"
SECTION = "speed table"
TOKENS = {"cpu": 512, "cuda": 2048}  # of the tables, per device
MIB = 2**20


class Target(NamedTuple):
    """``method`` at most ``bound`` times ``reference``, in a part of the step suite."""

    part: str
    method: str
    reference: str
    bound: float
    nf4: bool = False
    activations: bool = True


TARGETS = [
    Target("training", "Dowser", "dense floor", 1.10),
    Target("training", "Dowser", "masked full fine-tuning", 1.0),
    Target("training", "Dowser", "PEFT SHiRA", 0.8),
    Target("training", "Dowser", "PEFT Super-Tuning", 0.8),
    Target("training", "Dowser column", "LoRA, same count", 1.05),
    Target("training", "Dowser column", "LoRA, same count", 1.0, nf4=True),
    Target("memory", "Dowser", "masked full fine-tuning", 0.40, activations=False),
    Target("memory", "Dowser", "PEFT SHiRA", 1.0),
    Target("memory", "Dowser", "PEFT Super-Tuning", 1.0),
    Target("memory", "Dowser column", "LoRA r=64", 1.0),
    Target("inference", "Dowser", "base", 1.15),
    Target("inference", "Dowser, merged", "base", 1.0),
]


def cell_of(rows: Iterable[Row], part: str, **wanted: object) -> dict[str, Row]:
    """Method -> its row, in the cell of the step suite with this configuration; empty if it was not measured."""
    wanted = {"nf4": False, "checkpointing": False, "rho": RHO} | wanted | {"part": part}
    return {
        row["method"]: row
        for row in rows
        if row["suite"] == "step" and all(row["configuration"][key] == value for key, value in wanted.items())
    }


def largest(rows: Iterable[Row], part: str, tokens: int, nf4: bool = False) -> tuple[str, int | None]:
    """(shape, layers) of the largest model that ``part`` was measured on; an empty shape if there is none."""
    found = [
        (row["configuration"]["weights"], row["configuration"]["shape"], row["configuration"]["layers"])
        for row in rows
        if cell_of([row], part, tokens=tokens, nf4=nf4)
    ]
    return max(found, key=lambda entry: entry[0])[1:] if found else ("", None)


def ratio(row: Row, reference: Row) -> Row:
    """Median and quantiles of the quotients of two rows of a cell."""
    samples, references = (found.get("samples", [found["median"]]) for found in (row, reference))
    return quantiles([one / other for one, other in zip(samples, references, strict=True)])


def methods_table(rows: list[Row]) -> str:
    """Markdown: every method on the largest model of one machine, time and memory of a training step."""
    tokens = TOKENS[rows[0]["device"]]
    shape, layers = largest(rows, "training", tokens)
    timed = cell_of(rows, "training", shape=shape, layers=layers, tokens=tokens)
    bare = cell_of(rows, "memory", shape=shape, layers=layers, tokens=ACTIVATION_FREE)
    whole = cell_of(rows, "memory", shape=shape, layers=layers, tokens=tokens)
    lines = [
        "| | trained weights | step time, dense floor = 1 | memory without activations | with activations |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method in (GEMMS, *METHODS):
        if method not in timed:
            continue
        row = timed[method]
        time = "{median:.2f} ({q20:.2f} to {q80:.2f})".format(**ratio(row, timed["dense floor"]))
        trained = f"{row['trained_parameters']:,}" if METHODS.get(method, METHODS["dense floor"]).optimise else ""
        sizes = [f"{cell[method]['median'] / MIB:,.0f} MiB" if method in cell else "" for cell in (bare, whole)]
        lines.append(f"| {method} | {trained} | {time} | {' | '.join(sizes)} |")
    weights = next(iter(timed.values()))["configuration"]["weights"]
    return f"{_machine(rows[0])}, {weights / 1e6:,.0f}M target weights, {tokens} tokens:\n\n" + "\n".join(lines)


def _machine(row: Row) -> str:
    if row["device"] == "cuda":
        return f"{row['device_name']}, bfloat16"
    return f"{row['device_name']} ({row['threads']} threads), float32"


def targets_table(rows: list[Row]) -> str:
    """Markdown: what was aimed for and what was measured, on the largest model that each was measured on."""
    lines = ["| | compared with | aim | measured | model, tokens |", "| --- | --- | ---: | ---: | --- |"]
    for target in TARGETS:
        tokens = 512 if target.part == "inference" else TOKENS[rows[0]["device"]]
        if not target.activations:
            tokens = ACTIVATION_FREE
        shape, layers = largest(rows, target.part, tokens, target.nf4)
        cell = cell_of(rows, target.part, shape=shape, layers=layers, tokens=tokens, nf4=target.nf4)
        if not {target.method, target.reference} <= cell.keys():
            continue
        what = {"training": "step time", "memory": "peak memory", "inference": "forward"}[target.part]
        what += " without activations" * (not target.activations) + " on a 4-bit base" * target.nf4
        measured = ratio(cell[target.method], cell[target.reference])["median"]
        entries = (f"{target.method}: {what}", target.reference, f"{target.bound:.2f}", f"{measured:.2f}")
        lines.append(f"| {' | '.join(entries)} | {shape}, {tokens} |")
    return "\n".join(lines)


def by_machine(rows: Iterable[Row]) -> list[list[Row]]:
    """The latest rows of the step suite, of each machine."""
    machines: dict[str, list[Row]] = {}
    for row in latest(rows):
        if row["suite"] == "step":
            machines.setdefault(_machine(row), []).append(row)
    return list(machines.values())


def probe_table(rows: Iterable[Row]) -> str:
    """Markdown: how many times faster than the authors' procedure the probes are, lowest and highest of all runs."""
    cells: dict[tuple[str, str], dict[str, dict[tuple[str, str], Row]]] = {}
    for row in rows:
        runs = cells.setdefault((row["configuration"]["shape"], _machine(row)), {})
        runs.setdefault(row["run"], {})[row["method"], row["metric"]] = row
    lines = [
        "| probe, score and select | fixed N=64, R=8 | adaptive stop | mask error, fixed / adaptive |",
        "| --- | ---: | ---: | ---: |",
    ]
    for (shape, machine), runs in sorted(cells.items(), key=lambda entry: int(entry[0][0].rstrip("mb"))):
        faster = []
        for method in ("fixed", "adaptive"):
            bare, whole = (
                _span([run["authors", metric]["median"] / run[method, metric]["median"] for run in runs.values()])
                for metric in ("without prompts", "with prompts")
            )
            faster.append(f"{bare} ({whole})")
        *_, last = runs.values()
        errors = [last[method, "with prompts"]["mask_error"] for method in ("fixed", "adaptive")]
        shown = "" if None in errors else " / ".join(f"{error:.3f}" for error in errors)
        lines.append(f"| {shape}, {machine} | {' | '.join(faster)} | {shown} |")
    return "\n".join(lines)


def _span(factors: list[float]) -> str:
    low, high = (f"{end:.1f}" for end in (min(factors), max(factors)))
    return f"{low}x" if low == high else f"{low} to {high}x"


def selection_table(rows: Iterable[Row]) -> str:
    """Markdown: million weights a second, and extra memory, of the selection and of two other ways."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(f"{row['case']}, {row['device'].split(':')[0]}", {})[row["method"]] = row
    methods = {
        "dowser-peft": "one pass",
        "three passes": "histogram, three passes",
        "kthvalue": "score matrix, kthvalue",
    }
    lines = [f"| selection | {' | '.join(methods.values())} |", "| --- |" + " ---: |" * len(methods)]
    for case, cell in cells.items():
        shown = [f"{cell[m]['weights_per_s'] / 1e6:,.0f} M/s, {cell[m]['extra_bytes'] / 1e6:,.0f} MB" for m in methods]
        lines.append(f"| {case} | {' | '.join(shown)} |")
    return "\n".join(lines)


def switching_table(rows: Iterable[Row]) -> str:
    """Markdown: milliseconds of a switch to another adapter, and what it leaves behind, on the largest model."""
    cells: dict[str, list[Row]] = {}
    for row in latest(rows):
        cells.setdefault(row["configuration"]["shape"], []).append(row)
    lines = []
    for shape, found in sorted(cells.items(), key=lambda entry: int(entry[0].rstrip("mb"))):
        times = {row["method"]: row for row in found if row["metric"] == "switch time"}
        changed = {row["method"]: row["median"] for row in found if row["metric"] == "base weights changed"}
        lines = [
            f"| {shape}, {_machine(found[0])}, bfloat16 | ms | base weights changed |".replace(", float32", ""),
            "| --- | ---: | ---: |",
        ]
        for name, row in sorted(times.items(), key=lambda entry: entry[1]["median"]):
            method, _, way = name.partition(": ")
            left = f"{100 * changed[method]:.2g} %" if way == "unmerge, merge" else ""
            time = "{median:,.0f} ({q20:,.0f} to {q80:,.0f})".format(**row)
            lines.append(f"| {name} | {time} | {left} |")
    return "\n".join(lines)


def summary() -> str:
    """What README.md shows of the committed rows."""
    steps = by_machine(load_rows(RESULTS / "step.jsonl"))
    return "\n\n".join(
        (
            *("**Training step.** " + methods_table(found) for found in steps),
            "**Memory** of a training step of LLaVA-1.5-7B, bfloat16, all 32 layers, gradient checkpointing, 1 x 2048 "
            "tokens, in GB; computed, and equal to measurement on small models within 0.2 % (SHiRA in bfloat16: "
            "3 %). Total is the larger of backward pass and optimizer step:\n\n" + accounting.markdown(),
        )
    )


def details() -> str:
    """What README.md beside this file shows of them."""
    step, probing, scoring, switching = (
        load_rows(RESULTS / f"{name}.jsonl") for name in ("step", "probing", "scoring", "switching")
    )
    parts = {
        "Aims, and what was measured": "\n\n".join(
            f"{_machine(found[0])}:\n\n{targets_table(found)}" for found in by_machine(step)
        ),
        "Probe": "Times faster than the authors' published procedure on the same prompts, without (with) the writing "
        "of the prompts:\n\n" + probe_table(probing),
        "Selection": "Of one layer, N=64, rho=0.1, bfloat16: million weights a second, extra memory:\n\n"
        + selection_table(scoring),
        "Switching": "To another adapter: merged into one base, in place from a file, or the whole model anew:\n\n"
        + switching_table(switching),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into both README.md")
    options = parser.parse_args(arguments)
    for path, text in ((README, summary()), (DETAILS, details())):
        print(text)
        if options.write:
            write_section(path, SECTION, text)


if __name__ == "__main__":
    main()
