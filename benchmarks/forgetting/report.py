"""Tables of the forgetting benchmark, from its rows alone.

Every number is in percent of questions answered exactly. "Upstream" is the average over the old tasks, H the harmonic
mean of upstream and downstream. A method stands at its chosen rate: the best mean H-score on the validation questions
over base models; what is shown is of the test questions, mean ± standard deviation over base models and fine-tuning
seeds (n of them). "H less Dowser's": mean ± standard deviation of the differences on the same base model and seed.
"Upstream at downstream >= 85" is read off the curve of test scores over all rates, not chosen by validation, on base
models whose lowest rate learns less. By depth and by rho a method stands at the best rate of the first base model,
which alone was swept there, at one fine-tuning seed; so the numbers for all layers and for rho 0.1 may differ from
those of the main table.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.forgetting import rows as records
from benchmarks.forgetting import stability
from benchmarks.forgetting.curves import at_chosen_rate, at_first_rate, beyond, curve, frame, matched
from benchmarks.forgetting.methods import MASK_RATES, METHODS, TITLES
from benchmarks.forgetting.miniature import STEPS
from benchmarks.forgetting.protocol import (
    DEPTHS,
    HARSH,
    IN_DEPTH,
    IN_LARGER,
    IN_LONGER,
    IN_REGIMES,
    IN_RHO,
    ITEMS,
    LARGE,
    LONGER,
    MATCHED,
    REGIMES,
    RHO,
    RHOS,
)
from benchmarks.forgetting.rows import Row
from benchmarks.pages import write_section

REAL = "real.jsonl"
README, SECTION = Path(__file__).parents[2] / "README.md", "forgetting table"
# Tables of a task: title, groups of methods.
GROUPS = {
    "main": ("Methods", ("paper", "peft", "column")),
    "ablation": (TITLES["ablation"], ("ablation",)),
    "variant": (TITLES["variant"], ("variant",)),
    "decay": (TITLES["decay"], ("decay",)),
}
IN_OVERVIEW = ("full-decay-30", "dowser-decay-3", "dowser-decay-10")  # of README, beside the main methods
REFERENCES = ("full", "dowser")  # in every table


def _spread(values: pd.Series, sign: str = "") -> str:
    if values.empty:
        return ""
    deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}{deviation}"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    escaped = [[cell.replace("|", r"\|") for cell in cells] for cells in [header, rule, *lines]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def main_table(rows: Iterable[Row], task: str, group: str = "main", items: int = ITEMS) -> str:
    """Each method of a group at its chosen rate, its H less Dowser's pair by pair, and upstream at matched downstream
    score. With weight decay also H less that of the same method without."""
    runs = frame(rows)
    curves = {name: curve(runs, name, task, items) for name in METHODS}
    chosen = {name: at_chosen_rate(found) for name, found in curves.items()}
    lines = []
    for name, method in METHODS.items():
        if not (method.group in GROUPS[group][1] or name in REFERENCES) or chosen[name].empty:
            continue
        rate = "" if chosen[name]["lr"].isna().all() else f"{chosen[name]['lr'].iloc[0]:g}"
        cells = [_spread(chosen[name][column]) for column in ("downstream", "upstream", "h")]
        references = ["dowser", *([name.split("-decay-")[0]] if group == "decay" else [])]
        pairs = [beyond(chosen[name], chosen[other]) for other in references]
        cells += [
            _spread(pair, "+") if rate and len(pair) and name != other else ""
            for pair, other in zip(pairs, references, strict=True)
        ]
        lines.append([method.label, rate, *cells, str(len(chosen[name])), _level(curves[name]) if rate else ""])
    header = ["", "learning rate", "downstream", "upstream", "H", "H less Dowser's"]
    header += [*(["H less that without decay"] if group == "decay" else []), "n"]
    return _markdown([*header, f"upstream at downstream >= {MATCHED:g} (base models)"], lines)


def _level(runs: pd.DataFrame) -> str:
    found = matched(runs)
    if found.empty:
        return "not reached" if runs["downstream"].max() < MATCHED else "reached by every rate"
    return f"{_spread(found)} ({len(found)})"


def has_group(rows: Iterable[Row], task: str, group: str) -> bool:
    """Whether any method of the group, other than those shown in every table, has a row on the task."""
    found = {row["method"] for row in rows if row["task"] == task} - set(REFERENCES)
    return any(METHODS[name].group in GROUPS[group][1] for name in found if name in METHODS)


def rates_table(rows: Iterable[Row], task: str) -> str:
    """Downstream and upstream average at every rate that the masks have in common: what a mask is worth where the rate
    is too high. On the first base model, and at the highest rate also on all: with upstream less Dowser's on each."""
    runs = frame(rows)
    runs = runs[runs["seed"] == 0]
    reference = _upstream_by_base(curve(runs, "dowser", task), HARSH)
    lines = []
    for name in [name for name, method in METHODS.items() if method.rates == MASK_RATES and "-decay-" not in name]:
        found = curve(runs, name, task)
        first = found[found["pretraining_seed"] == found["pretraining_seed"].min()].set_index("lr")
        if set(MASK_RATES) <= set(first.index):
            harsh = _upstream_by_base(found, HARSH)
            pairs = _spread((harsh - reference).dropna(), "+") if name != "dowser" else ""
            cells = [_learned_and_kept(first.loc[rate]) for rate in MASK_RATES]
            lines.append([METHODS[name].label, *cells, f"{_spread(harsh)} ({len(harsh)})", pairs])
    header = ["downstream / upstream", *(f"rate {rate:g}" for rate in MASK_RATES)]
    return _markdown([*header, f"upstream at {HARSH:g} (base models)", "less Dowser's"], lines)


def harsh_table(rows: Iterable[Row]) -> str:
    """Of masks that were tried on all tasks: upstream average at the highest rate that masks have in common, less
    Dowser's on the same base model, and on how many of base models and tasks together it is below Dowser's."""
    runs = _first_seed(frame(rows))
    tasks = [task for task in STEPS if task in set(runs["task"])]

    def by_base(name: str) -> dict[str, pd.Series]:
        return {task: _upstream_by_base(curve(runs, name, task), HARSH) for task in tasks}

    reference = by_base("dowser")
    lines = [[METHODS["dowser"].label, *(_spread(reference[task]) for task in tasks), ""]]
    for name in [name for name, method in METHODS.items() if method.rates == MASK_RATES and name != "dowser"]:
        pairs = [(found - reference[task]).dropna() for task, found in by_base(name).items()]
        if all(map(len, pairs)):
            differences = pd.concat(pairs)
            below = f"{(differences < 0).sum()} of {len(differences)}"
            lines.append([METHODS[name].label, *(_spread(pair, "+") for pair in pairs), below])
    return _markdown([f"upstream at rate {HARSH:g}", *tasks, "below Dowser's on"], lines)


def _upstream_by_base(runs: pd.DataFrame, rate: float) -> pd.Series:
    return runs[runs["lr"] == rate].set_index("pretraining_seed")["upstream"]


def _learned_and_kept(run: pd.Series) -> str:
    return f"{run['downstream']:.0f} / {run['upstream']:.0f}"


def overview_table(rows: Iterable[Row]) -> str:
    """For README: upstream average and H of each method that people use, at its chosen rate on each task."""
    runs = frame(rows)
    tasks = [task for task in STEPS if task in set(runs["task"])]
    lines = []
    for name in [name for name in METHODS if METHODS[name].group in GROUPS["main"][1] or name in IN_OVERVIEW]:
        cells = [_upstream_and_h(at_chosen_rate(curve(runs, name, task))) for task in tasks]
        if any(cells):
            lines.append([METHODS[name].label, *cells])
    return _markdown(["upstream / H", *tasks], lines)


def task_table(rows: Iterable[Row], task: str) -> str:
    """Mean test accuracy of every old task, each method at its chosen rate."""
    runs = frame(row for row in rows if row["task"] == task)
    names = [name for name in runs.columns if name.startswith("task:") and name != f"task:{task}"]
    lines = []
    for method in METHODS:
        chosen = at_chosen_rate(curve(runs, method, task))
        if not chosen.empty:
            lines.append([METHODS[method].label, *(f"{chosen[name].fillna(0).mean():.0f}" for name in names)])
    return _markdown(["", *(name.removeprefix("task:") for name in names)], lines)


def depth_table(rows: Iterable[Row], task: str) -> str:
    """H-score and upstream average by the number of last layers that are fine-tuned; see :func:`at_first_rate`."""
    runs = frame(rows)
    return _variations(
        runs, task, IN_DEPTH, [(f"last {depth}", RHO, depth) for depth in DEPTHS] + [("all", RHO, None)]
    )


def rho_table(rows: Iterable[Row], task: str) -> str:
    """H-score and upstream average by the share of weights that change; at 1 every line is full fine-tuning. See
    :func:`at_first_rate`."""
    runs = frame(rows)
    shown = _variations(runs, task, IN_RHO, [(f"rho {rho:g}", rho, None) for rho in sorted([*RHOS, RHO])])
    header, rule, *lines = shown.splitlines()
    full = _upstream_and_h(at_first_rate(curve(runs, "full", task)))
    return "\n".join([f"{header} rho 1 |", f"{rule} ---: |", *(f"{line} {full} |" for line in lines)])


def longer_table(rows: Iterable[Row], task: str) -> str:
    """Downstream, upstream average and H after the usual number of steps and after ``LONGER`` times as many, of a
    method on the same base models (n of them), one fine-tuning seed."""
    runs = _first_seed(frame(rows))
    lines = []
    for name in IN_LONGER:
        longer = curve(runs, name, task, longer=LONGER)
        usual = curve(runs, name, task)
        usual = usual[usual["pretraining_seed"].isin(longer["pretraining_seed"])]
        parts = [at_chosen_rate(usual), at_chosen_rate(longer)]
        if len(longer):
            rates = [f"{part['lr'].iloc[0]:g}" if len(part) else "" for part in parts]
            cells = [cell for rate, part in zip(rates, parts, strict=True) for cell in (rate, _all_three(part))]
            lines.append([METHODS[name].label, *cells, str(len(parts[1]))])
    header = [f"downstream / upstream / H on {task}"]
    for times in (1, LONGER):
        header += ["learning rate", f"{times * STEPS[task]} steps"]
    return _markdown([*header, "n"], lines)


def _all_three(runs: pd.DataFrame) -> str:
    return "" if runs.empty else " / ".join(_spread(runs[column]) for column in ("downstream", "upstream", "h"))


def regimes_table(rows: Iterable[Row], task: str) -> str:
    """Upstream average, H-score and H less Dowser's on base models transformed as transforms.py says, of the same base
    models in each, one fine-tuning seed."""
    runs = _first_seed(frame(row for row in rows if row["task"] == task))
    runs = runs[runs["pretraining_seed"].isin(runs.loc[runs["transform"].notna(), "pretraining_seed"])]
    settings = {title: {"transform": transform} for title, transform in REGIMES.items()}
    return _beside_dowser(runs, task, IN_REGIMES, settings)


def larger_table(rows: Iterable[Row], task: str) -> str:
    """Upstream average, H-score and H less Dowser's on base models of both sizes, all that there are of each, one
    fine-tuning seed."""
    runs = _first_seed(frame(row for row in rows if row["task"] == task))
    return _beside_dowser(runs, task, IN_LARGER, {"3M": {}, LARGE: {"size": LARGE}})


def _first_seed(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["seed"] == runs["seed"].min()]


def _beside_dowser(runs: pd.DataFrame, task: str, methods: list[str], settings: dict[str, dict[str, Any]]) -> str:
    """A line a method, a column each of ``settings``, which are fields of ``Case``."""
    chosen = {
        name: [at_chosen_rate(curve(runs, name, task, **fields)) for fields in settings.values()] for name in methods
    }
    lines = []
    for name, parts in chosen.items():
        cells = [_upstream_and_h(part) for part in parts]
        if name != "dowser" and METHODS[name].rates:
            pairs = [beyond(part, dowser) for part, dowser in zip(parts, chosen["dowser"], strict=True)]
            cells = [
                f"{cell} / {_spread(pair, '+')}" if len(pair) else cell
                for cell, pair in zip(cells, pairs, strict=True)
            ]
        if any(cells):
            lines.append([METHODS[name].label, *cells])
    return _markdown(["upstream / H / H less Dowser's", *settings], lines)


def _upstream_and_h(runs: pd.DataFrame) -> str:
    return "" if runs.empty else f"{_spread(runs['upstream'])} / {_spread(runs['h'])}"


def _variations(
    runs: pd.DataFrame, task: str, methods: list[str], settings: list[tuple[str, float, int | None]]
) -> str:
    lines = []
    for name in methods:
        parts = [at_first_rate(curve(runs, name, task, rho=rho, depth=depth)) for _, rho, depth in settings]
        if sum(len(part) > 0 for part in parts) > 1:
            lines.append([METHODS[name].label, *map(_upstream_and_h, parts)])
    return _markdown(["upstream / H", *(title for title, _, _ in settings)], lines)


def stability_frame(path: Path = stability.RESULTS) -> pd.DataFrame:
    """One line a comparison of scores; see :mod:`benchmarks.forgetting.stability`."""
    return pd.DataFrame(records.read(path))


def stability_table(path: Path = stability.RESULTS) -> str:
    """Spearman and Hamming to the real-data score, mean ± standard deviation over base models and probe seeds."""
    found = stability_frame(path)
    lines = []
    for (source, prompts, probes), part in found.groupby(["source", "num_prompts", "num_probes"], sort=False):
        spread = [f"{part[name].mean():.3f} ± {part[name].std():.3f}" for name in ("spearman", "hamming")]
        lines.append([source, str(prompts or ""), str(probes or ""), *spread, str(len(part))])
    return _markdown(["scored by", "N", "R", "Spearman", "Hamming", "n"], lines)


# Tables beyond the main ones: title, table, which rows call for it.
STUDY_TABLES: list[tuple[str, Callable[[Iterable[Row], str], str], Callable[[Row], bool]]] = [
    ("Depth", depth_table, lambda row: bool(row["depth"])),
    ("Update ratio", rho_table, lambda row: row["rho"] not in (None, RHO)),
    ("The same function with other weights", regimes_table, lambda row: bool(row.get("transform"))),
    ("Longer training", longer_table, lambda row: row["steps"] > STEPS[row["task"]]),
    ("Larger base models", larger_table, lambda row: bool(row.get("size"))),
]


def _is_real(row: Row) -> bool:
    return "upstream" in row


def _identity(row: Row) -> Hashable:
    if not _is_real(row):
        return records.run_of(row)
    from benchmarks.forgetting.real import runs  # which needs more packages

    return runs.run_of(row)


def page(rows: list[Row], stable: Path) -> str:
    """All tables of the miniature: Markdown.

    Args:
        rows: of its runs.
        stable: file of the rows of :mod:`benchmarks.forgetting.stability`, if there is one.
    """
    tasks = [task for task in STEPS if any(row["task"] == task for row in rows)]
    parts = [__doc__ or ""] if rows else []
    for task in tasks:
        parts += [f"## {task}"]
        for group in [group for group in GROUPS if has_group(rows, task, group)]:
            parts += [f"### {GROUPS[group][0]}: {task}", main_table(rows, task, group)]
        parts += [f"### Masks at the same rate: {task}", rates_table(rows, task)]
        parts += [f"### Old tasks, one by one: {task}", task_table(rows, task)]
    if len(tasks) > 1:
        parts += ["## Masks at a rate that is too high", harsh_table(rows)]
    for title, table, has_rows in STUDY_TABLES:
        found = [task for task in tasks if any(row["task"] == task and has_rows(row) for row in rows)]
        if found:
            parts += [f"## {title}", *(f"{task}:\n\n{table(rows, task)}" for task in found)]
    if stable.exists():
        parts += ["## Stability of data-free scores", stability_table(stable)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write(results: Path, folder: Path | None = None) -> None:
    """Write ``tables.md`` and the figures beside the rows, or into ``folder``; from the committed rows README's table.

    Args:
        results: rows of the miniature or of real models; with those of the other beside it, if this is one of the
            usual files.
        folder: for what is written.
    """
    from benchmarks.forgetting import figures

    files = [results, results.with_name(records.RESULTS.name if results.name == REAL else REAL)]
    found = [row for file in files for row in records.read(file, _identity)]
    rows, real_rows = ([row for row in found if _is_real(row) == kind] for kind in (False, True))
    folder = folder or results.parent
    folder.mkdir(parents=True, exist_ok=True)
    stable = results.with_name(stability.RESULTS.name)
    text = page(rows, stable)
    if real_rows:
        from benchmarks.forgetting.real import report as real

        text += f"\n## Real models\n\n{(real.__doc__ or '').strip()}\n\n{real.write_tables(real_rows).strip()}\n"
    (folder / "tables.md").write_text(text.lstrip())
    if rows:
        for path in figures.draw_all(frame(rows), stability_frame(stable) if stable.exists() else None, folder):
            print(path)
    print(folder / "tables.md")
    if results == records.RESULTS and folder == results.parent:
        write_section(README, SECTION, overview_table(rows))
        print(README)
