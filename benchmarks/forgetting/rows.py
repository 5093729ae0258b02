"""Rows of results: one JSON line a run, in a file that survives being killed.

A run is identified by its settings alone (:class:`Run`); whichever study asks for it, it is made once. A failed run
leaves a row too: one whose loss became NaN or infinite counts as finished, any other failure is tried again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "runs.jsonl"
OK, DIVERGED, FAILED = "ok", "diverged", "failed"


@dataclass(frozen=True)
class Run:
    """The settings of one run: what is tuned how, and on how many questions a task it is tested.

    ``transform`` changes the base model before, ``size`` is that of a larger one (``pretrain.SIZES``); rows of runs
    without may lack both.
    """

    pretraining_seed: int
    task: str
    method: str
    lr: float | None
    steps: int
    seed: int
    rho: float | None
    depth: int | None
    items: int
    transform: str | None = None
    size: str | None = None


KEYS = [field.name for field in dataclasses.fields(Run)]


def run_of(row: Row) -> Run:
    return Run(**{key: row[key] for key in KEYS if key in row})


def h_score(upstream: float, downstream: float) -> float:
    """Harmonic mean of the average of the old tasks and the new one, in percent."""
    return 2 * upstream * downstream / (upstream + downstream) if upstream + downstream else 0.0


def summary(scores: dict[str, float], task: str) -> dict[str, float]:
    """Downstream score, upstream average and H-score of the accuracies of one split."""
    old = [score for name, score in scores.items() if name != task]
    upstream = sum(old) / len(old)
    return {"downstream": scores[task], "upstream": upstream, "h": h_score(upstream, scores[task])}


def read(path: Path = RESULTS, identity: Callable[[Row], Hashable] = run_of) -> list[Row]:
    """All rows of a file; the last one of each run. A last line that was torn by a kill is left out.

    Args:
        path: the file.
        identity: the run of a row.

    Raises:
        ValueError: if another line is no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    rows: dict[Any, Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline behind it
                continue
            raise ValueError(f"{path}, line {number} is damaged: {error}") from error
        rows[identity(row) if "method" in row else number] = row
    return list(rows.values())


def append(rows: list[Row], path: Path = RESULTS) -> None:
    """Add rows with one write, one process at a time. A torn last line is cut off first; a whole one without its
    newline gets it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("ab+") as file:
        file.seek(0)
        written = file.read()
        end = written.rfind(b"\n") + 1
        whole = end < len(written) and _is_json(written[end:])
        if not whole:
            file.truncate(end)
        file.write(("\n" * whole + "".join(json.dumps(row) + "\n" for row in rows)).encode())


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def finished(rows: Iterable[Row], identity: Callable[[Row], Any] = run_of) -> set[Any]:
    """Runs that need not be made again."""
    return {identity(row) for row in rows if row["status"] != FAILED}
