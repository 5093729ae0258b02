"""What every suite shares: rows, interleaved timing, peak memory, the record of the machine.

A *cell* is one configuration of a suite (a model shape, a sequence length, ...). All methods of a cell are measured
in one process, interleaved (A B C A B C ...), so that a change in the machine's speed hits them alike; only ratios
within a cell mean something on a shared machine. A cell writes one JSON line per method and metric:

    {"suite": "step", "configuration": {"shape": "33m", "tokens": 512}, "run": "2026-01-31T12:00:00",
     "method": "LoRA r=64", "metric": "step time", "unit": "ms", "median": 41.2, "q20": 40.9, "q80": 42.0,
     "repeats": 7, ..., "device": "cpu", "device_name": "AMD EPYC", "threads": 2, "versions": {...},
     "commit": "0123abc", "dirty": false}

``run`` is the same in all lines of a cell. A cell that is finished for the present commit is skipped when the suite
is started again; readers take the latest run of each cell (:func:`latest`).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("dowser-peft", "torch", "triton", "peft", "transformers", "bitsandbytes")
# What a measurement depends on: a commit of anything else does not outdate a row.
SOURCES = ("dowser_peft", "benchmarks/speed", ":(exclude)benchmarks/speed/results")
Row = dict[str, Any]


def choose_device(name: str) -> torch.device:
    """``auto``: the first GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def add_arguments(parser: argparse.ArgumentParser, results: str) -> None:
    """The options every suite has; ``results`` is its file in ``results/``."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / results, help="JSON-lines file that rows are added to")
    parser.add_argument("--fresh", action="store_true", help="measure cells again that are finished for this commit")


def environment(device: torch.device) -> Row:
    """The machine, the versions and the commit that a row was measured with."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _git("log", "-1", "--format=%h", "--", *SOURCES) or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--", *SOURCES)),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip()


def quantiles(samples: Sequence[float]) -> Row:
    """Median, 20 % and 80 % quantile (linear between order statistics) and the number of samples."""
    if len(samples) == 1:
        return {"median": samples[0], "q20": samples[0], "q80": samples[0], "repeats": 1}
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "median": statistics.median(samples),
        "q20": fifths[0],
        "q80": fifths[3],
        "repeats": len(samples),
    }


class Results:
    """The rows of a suite: what is finished, and where the rest goes."""

    def __init__(self, path: Path, device: torch.device, *, fresh: bool = False) -> None:
        self.path = path
        self.environment = environment(device)
        seen = [] if fresh else load_rows(path)
        self._finished = {
            _cell(row) for row in seen if row["commit"] == self.environment["commit"] and not row["dirty"]
        }

    def is_finished(self, suite: str, configuration: Mapping[str, Any]) -> bool:
        """Whether this cell was measured on such a device at the present commit."""
        return _cell({"suite": suite, "configuration": configuration, **self.environment}) in self._finished

    def add(self, suite: str, configuration: Mapping[str, Any], measurements: Iterable[Row]) -> list[Row]:
        """Write the rows of a whole cell.

        Args:
            suite: the file name of the suite.
            configuration: what was measured: plain JSON values.
            measurements: a dictionary per row with at least ``method``, ``metric``, ``unit`` and the
                :func:`quantiles`; more keys may be added, e.g. ``samples``, round by round.
        """
        cell = {"suite": suite, "configuration": dict(configuration)}
        run = {"run": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        rows = [{**cell, **run, **measurement, **self.environment} for measurement in measurements]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return rows


def load_rows(path: Path) -> list[Row]:
    """All rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the latest run of each cell."""
    cells: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        known = cells.get(_cell(row), [])
        if known and known[0]["run"] > row["run"]:
            continue
        cells[_cell(row)] = [*known, row] if known and known[0]["run"] == row["run"] else [row]
    return [row for cell in cells.values() for row in cell]


def _cell(row: Row) -> tuple[str, ...]:
    """What makes two rows comparable: suite, configuration, machine."""
    configuration = json.dumps(row["configuration"], sort_keys=True)
    return row["suite"], configuration, row["device_name"], str(row["threads"])


def interleave(
    actions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = 5,
    warmup: int = 1,
    budget_s: float | None = None,
) -> dict[str, list[float]]:
    """Time every action ``repeats`` times, in turn: A B C A B C ...

    Args:
        actions: name -> what is timed.
        device: where it runs; on a GPU a sample is the time between two events in its stream.
        repeats: rounds; at least three are done whatever the budget.
        warmup: rounds before that, not kept.
        budget_s: stop after the round that reaches this many seconds.

    Returns:
        name -> milliseconds of every round.
    """
    for _ in range(warmup):
        for action in actions.values():
            action()
    samples: dict[str, list[float]] = {name: [] for name in actions}
    started = time.perf_counter()
    for done in range(repeats):
        if budget_s is not None and done >= 3 and time.perf_counter() - started > budget_s:
            break
        for name, action in actions.items():
            samples[name].append(round(time_ms(action, device), 4))
    return samples


def time_ms(action: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end)
    started = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - started)


class PeakMemory(NamedTuple):
    """Bytes held by torch, counted from the beginning of ``prepare``."""

    before: int  # alive when the action began
    peak: int  # most that was alive at once while it ran


def peak_memory(prepare: Callable[[], Callable[[], object]], device: torch.device) -> PeakMemory:
    """Peak of what torch has allocated while an action runs.

    Counted is whatever ``prepare`` and the action allocate through torch's allocator on ``device``, temporaries
    inside operators included; exact, and blind to what else the process holds. On a CPU it is the running sum of the
    profiler's allocation events: scratch of the BLAS library and Python's own memory are not in it.

    Args:
        prepare: builds everything (the base weights too), runs the action's warm-up and returns the action.
        device: where it runs.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        outside = torch.cuda.memory_allocated(device)
        action = prepare()
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return PeakMemory(before - outside, torch.cuda.max_memory_allocated(device) - outside)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        action = prepare()
        gc.collect()
        with record_function(_ACTION):
            action()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == _ACTION)
    alive = before = peak = 0
    for event in events:
        if event.name() != "[memory]":
            continue
        if event.start_ns() < begin:
            before = alive = alive + event.nbytes()
            peak = alive
        else:
            alive += event.nbytes()
            peak = max(peak, alive)
    return PeakMemory(before, peak)


_ACTION = "measured action"
