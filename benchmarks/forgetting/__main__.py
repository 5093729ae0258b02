"""Does it keep what the model knew? Every method on every downstream task, one row a run.

    python -m benchmarks.forgetting --quick            # a look in a few minutes; keeps nothing
    python -m benchmarks.forgetting all --dry-run      # stages, runs, core-hours
    python -m benchmarks.forgetting main               # main table and Pareto curves; then: ablations, depth, rho
    python -m benchmarks.forgetting variants           # of the score and of the choice of masks
    python -m benchmarks.forgetting regimes            # the same function with other weights, so that |W| misleads
    python -m benchmarks.forgetting longer             # four times the steps
    python -m benchmarks.forgetting larger             # base models of 10M parameters
    python -m benchmarks.forgetting decay              # weight decay that draws the delta to zero
    python -m benchmarks.forgetting harsh              # every mask at one rate that is too high
    python -m benchmarks.forgetting stability          # data-free against real-data scores
    python -m benchmarks.forgetting all                # main, ablations, depth, rho; most telling rows first
    python -m benchmarks.forgetting report             # tables and figures from the rows
    python -m benchmarks.forgetting real --help        # real models and data instead of the miniature

Kill it at any time: started again, it goes on. Protocol and cost: benchmarks/forgetting/protocol.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.forgetting import harness, miniature, protocol, rows, stability
from benchmarks.forgetting.methods import METHODS, UnknownNameError, check_names
from benchmarks.forgetting.outcome import exit_code

QUICK_ITEMS = 60


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "study", nargs="?", default="main", help=f"{', '.join(protocol.STUDIES)}, stability, report or real"
    )
    found.add_argument(
        "--quick", action="store_true", help="style, few methods, one base model, one rate; under 6 minutes"
    )
    found.add_argument("--methods", nargs="+", help=f"some of: {', '.join(METHODS)}")
    found.add_argument(
        "--tasks", nargs="+", help=f"some of: {', '.join(miniature.TASKS)}; depth and rho take the first"
    )
    found.add_argument("--pretraining-seeds", type=int, nargs="+", default=[0, 1, 2], help="base models")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fine-tuning (and of the probe)")
    found.add_argument("--items", type=int, help=f"test questions a task (default {protocol.ITEMS})")
    found.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), help="processes of one thread each")
    found.add_argument("--results", type=Path, help="file of rows (default: benchmarks/forgetting/results)")
    found.add_argument("--cache", type=Path, default=miniature.CACHE, help="base models and shared full runs")
    found.add_argument("--dry-run", action="store_true", help="show stages, runs and core-hours, and stop")
    return found


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["real"] or any(argument.partition("=")[0] == "--model" for argument in arguments):
        from benchmarks.forgetting.real import command

        return command.main(arguments[arguments[:1] == ["real"] :])
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options), UnknownNameError, RuntimeError)


def _check(options: argparse.Namespace) -> None:
    check_names("study", [options.study], [*protocol.STUDIES, "stability", "report", "real"])
    check_names("method", options.methods or [], list(METHODS))
    check_names("task", options.tasks or [], list(miniature.STEPS))
    counts = [options.workers] if options.items is None else [options.workers, options.items]
    if min(counts) < 1 or min(options.pretraining_seeds + options.seeds) < 0:
        raise UnknownNameError("--workers and --items must be positive, seeds not negative")


def _run(options: argparse.Namespace) -> None:
    _check(options)
    from benchmarks.forgetting import report

    scope = protocol.Scope(
        tasks=tuple(options.tasks or protocol.STEPS),
        methods=tuple(options.methods) if options.methods else None,
        pretraining_seeds=tuple(options.pretraining_seeds),
        seeds=tuple(options.seeds),
        items=options.items or (QUICK_ITEMS if options.quick else protocol.ITEMS),
    )
    if options.study == "report":
        report.write(options.results or rows.RESULTS)
        return
    if options.study == "stability":
        _stability(options)
        return
    study = "quick" if options.quick else options.study
    if options.dry_run:
        _show(protocol.dry_run(study, scope))
        return
    stages = protocol.stages(study, scope)
    if not any(stage.runs([]) for stage in stages):
        raise UnknownNameError(f"study {study} has no runs of these methods and tasks (see --dry-run)")
    if not options.quick:
        _make(stages, options.results or rows.RESULTS, options.cache, options.workers)
        return
    with tempfile.TemporaryDirectory() as scratch:
        results = options.results or Path(scratch) / "quick.jsonl"
        _make(stages, results, Path(scratch), options.workers)
        print(report.main_table(rows.read(results), "style", items=scope.items))


def _make(stages: list[protocol.Stage], results: Path, cache: Path, workers: int) -> None:
    failed = harness.make(stages, results, cache, workers)
    if failed:
        raise RuntimeError(f"{failed} runs failed, as said above; started again, they are tried again")


def _stability(options: argparse.Namespace) -> None:
    results = options.results or stability.RESULTS
    done = {(row["pretraining_seed"], row["seed"]) for row in rows.read(results)}
    wanted = {
        base: seeds
        for base in options.pretraining_seeds
        if (seeds := [seed for seed in options.seeds if (base, seed) not in done])
    }
    if options.dry_run:
        _show([("stability", len(wanted), len(wanted) * stability.SECONDS / 3600)])
        return
    work = [(stability.SECONDS, stability.measure, (base, seeds, options.cache)) for base, seeds in wanted.items()]
    with harness.pool(options.workers) as executor:
        harness.perform_all(executor, "stability", work, lambda found: rows.append(found, results))


def _show(stages: list[tuple[str, int, float]]) -> None:
    for title, count, hours in [*stages, ("total", sum(row[1] for row in stages), sum(row[2] for row in stages))]:
        print(f"{title:32s} {count:5d} runs {hours:6.1f} core-hours")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely it ends its workers, as by Ctrl-C
    sys.exit(main())
