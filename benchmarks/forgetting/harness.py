"""Make the runs of a study with parallel workers; resumable at any point.

Workers are processes with one thread each. This process alone writes rows, each as soon as its run is done, so that
a kill loses only the runs under way; the next start skips what has a row.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from tqdm import tqdm

from benchmarks.forgetting import rows as records
from benchmarks.forgetting.experiment import perform
from benchmarks.forgetting.protocol import Stage, estimates
from benchmarks.forgetting.rows import FAILED, OK, Row, Run


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes of one thread; when this is left by an exception, they are ended at once."""
    os.environ["OMP_NUM_THREADS"] = "1"  # workers read both when they import torch and tqdm
    os.environ["TQDM_DISABLE"] = "1"  # for this process, which has its bars already, it is too late
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker)
    try:
        yield executor
    except BaseException:
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    import warnings

    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def _end_with_parent() -> None:
    """A harness that is killed outright cannot end its workers: they watch it."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def make(stages: list[Stage], results: Path, cache: Path, workers: int) -> int:
    """Make all runs of ``stages`` that have no finished row in ``results``.

    Returns:
        How many failed for another reason than a loss that is no number.

    Raises:
        RuntimeError: if a worker process was killed; starting again goes on from there.
    """
    failed = 0

    def done_with(row: Row) -> None:
        nonlocal failed
        keep(row, results)
        failed += row["status"] == FAILED

    with pool(workers) as executor:
        for number, stage in enumerate(stages, start=1):
            attempted: set[Run] = set()
            while True:
                known = records.read(results)
                done = records.finished(known) | attempted  # a run that failed now is tried again next time
                pending = [run for run in stage.runs(known) if run not in done]
                if not pending:
                    break
                attempted |= set(pending)
                title = f"{number}/{len(stages)} {stage.title}"
                costs = estimates(pending, map(records.run_of, known))
                work = [(cost, perform, (run, cache)) for cost, run in zip(costs, pending, strict=True)]
                perform_all(executor, title, work, done_with)
    return failed


def keep(row: Row, results: Path) -> None:
    """Write a row, and say so if its run failed."""
    records.append([row], results)
    if row["status"] != OK:
        kind = "failed, will be tried again" if row["status"] == FAILED else "diverged"
        name = f"{row['method']} on {row['task']}, lr {row['lr']}, seeds {row['pretraining_seed']}/{row['seed']}"
        tqdm.write(f"{name}: {kind}: {row['error']}", file=sys.stderr)


def perform_all(
    executor: ProcessPoolExecutor,
    title: str,
    work: list[tuple[float, Callable[..., Any], tuple[Any, ...]]],
    done: Callable[[Any], None],
) -> None:
    """Call ``function(*arguments)`` of each ``(estimated seconds, function, arguments)`` in the workers.

    ``done`` gets every result as it comes. The bar counts estimated seconds, so that its ETA is not fooled by runs of
    different length.
    """
    total = round(sum(estimate for estimate, *_ in work))
    layout = "{desc} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
    with tqdm(total=total, desc=title, smoothing=0, bar_format=layout) as bar:
        futures: dict[Future[Any], float] = {
            executor.submit(function, *arguments): estimate for estimate, function, arguments in work
        }
        waiting = set(futures)
        bar.set_postfix_str(f"0/{len(work)}")
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in [future for future in futures if future in ready]:  # in the order of the work
                try:
                    done(future.result())
                except BrokenProcessPool as error:
                    raise RuntimeError(
                        "a worker process was killed, perhaps for want of memory (each takes about 1.5 GB). Rows "
                        "so far are safe: start again, with fewer --workers if need be"
                    ) from error
                bar.set_postfix_str(f"{len(work) - len(waiting)}/{len(work)}", refresh=False)
                bar.update(min(round(futures[future]), total - bar.n))
