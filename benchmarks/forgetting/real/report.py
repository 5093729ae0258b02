"""Table of runs on real models, from their rows alone.

Scores are in percent by each task's own metric (CIDEr can exceed 100). "Upstream" is the average over the old tasks,
H the harmonic mean of upstream and downstream, both as the paper has them; mean ± standard deviation over seeds (n).
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, stdev

from benchmarks.forgetting import rows as records
from benchmarks.forgetting.methods import METHODS
from benchmarks.forgetting.real.runs import KEYS
from benchmarks.forgetting.real.tasks import TASKS
from benchmarks.forgetting.rows import OK, Row

_SAME_LINE = [name for name in KEYS if name not in ("seed",)]
_SAME_TABLE = [
    "subject",
    "task",
    "upstream",
    "items",
    "train_items",
    "epochs",
    "batch",
    "dtype",
    "train_data",
    "test_data",
]
_OF_THE_TRAINING = ("train_items", "epochs", "batch", "train_data")  # zero or None for a method that does not train


def _spread(values: list[float]) -> str:
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"


def _is_in(row: Row, table: Row) -> bool:
    """Whether a row belongs to the table of another: a method that does not train, to all with the same questions."""
    names = _SAME_TABLE if METHODS[row["method"]].rates else [n for n in _SAME_TABLE if n not in _OF_THE_TRAINING]
    return all(row[name] == table[name] for name in names)


def write_tables(rows: Iterable[Row]) -> str:
    """One table for each model, downstream task and way to train, in the order of the rows; markdown."""
    known = [row for row in rows if row["status"] != records.FAILED]
    trained = [row for row in known if METHODS[row["method"]].rates]
    heads: list[Row] = []
    for row in trained or known:
        if not any(all(row[name] == head[name] for name in _SAME_TABLE) for head in heads):
            heads.append(row)
    return "\n\n".join(_table(head, [row for row in known if _is_in(row, head)]) for head in heads)


def _table(head: Row, rows: list[Row]) -> str:
    names = [*head["upstream"], head["task"]]
    of_training = f"{head['epochs']:g} epochs of {head['train_items'] or 'all'} examples, batch {head['batch']}"
    questions = f"{head['items']} questions a task" if head["items"] else "all questions"
    title = f"### {head['subject']}, {TASKS[head['task']].label}\n\n{of_training}, {head['dtype']}; {questions}."
    header = ["", "lr", "rho", "last layers", *(TASKS[name].label for name in names), "upstream", "H", "n"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    order = list(METHODS)
    groups: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: order.index(row["method"])):
        groups.setdefault(tuple(str(row[name]) for name in _SAME_LINE), []).append(row)
    for group in groups.values():
        first, scored = group[0], [row for row in group if row["status"] == OK]
        settings = [f"{first['lr']:g}" if first["lr"] else "", f"{first['rho']:g}" if first["rho"] else ""]
        settings.append(str(first["depth"] or ("all" if first["lr"] else "")))
        cells = [METHODS[first["method"]].label.replace("|", "\\|"), *settings]
        if scored:
            cells += [_spread([row["test"][name] for row in scored]) for name in names]
            found = [records.summary(row["test"], head["task"]) for row in scored]
            cells += [_spread([one[name] for one in found]) for name in ("upstream", "h")]
        else:
            cells += ["diverged", *[""] * (len(names) + 1)]
        diverged = len(group) - len(scored)
        lines.append([*cells, f"{len(scored)}" + (f" ({diverged} diverged)" if scored and diverged else "")])
    return title + "\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
