"""Does a real model keep what it knew? The paper's experiment, for whoever has weights and data.

    python -m benchmarks.forgetting real --model llava-hf/llava-1.5-7b-hf --downstream coco-caption \\
        --method zero-shot full lora dowser
    accelerate launch --multi_gpu -m benchmarks.forgetting real ...       # as many devices as accelerate is told
    python -m benchmarks.forgetting report                                # the table of all rows

The defaults are the paper's: the last 20 decoder layers, rho 0.1, AdamW with a cosine from 2e-5 to zero behind a
warm-up of 0.03 of the steps, 5 epochs of 10,000 examples in global batches of 128. Kill it at any time: started
again, it goes on. Data, cost and limits: benchmarks/forgetting/README.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from itertools import product
from pathlib import Path

import torch
from accelerate import PartialState

from benchmarks.forgetting import rows
from benchmarks.forgetting.methods import METHODS, UnknownNameError, check_names
from benchmarks.forgetting.outcome import exit_code
from benchmarks.forgetting.real import runs, tasks
from benchmarks.forgetting.real.examples import Examples
from benchmarks.forgetting.real.runs import Machine, Material, RealRun
from benchmarks.forgetting.real.sources import DataError, Split
from benchmarks.forgetting.rows import FAILED, OK
from dowser_peft.cli.models import Source, load_config
from dowser_peft.miniature.training import join_processes

RESULTS = Path(__file__).parents[1] / "results" / "real.jsonl"
CACHE = Path.home() / ".cache" / "dowser-peft" / "real"


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--model", required=True, help="hub id or folder")
    found.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with it (NVILA)")
    found.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of its weights")
    found.add_argument("--downstream", nargs="+", required=True, help=f"some of: {', '.join(tasks.DOWNSTREAM)}")
    found.add_argument("--upstream", nargs="+", default=tasks.UPSTREAM, help=f"some of: {', '.join(tasks.UPSTREAM)}")
    found.add_argument("--method", nargs="+", default=["dowser"], help=f"some of: {', '.join(METHODS)}")
    found.add_argument("--lr", type=float, nargs="+", default=[2e-5], help="highest learning rate; one row each")
    found.add_argument("--rho", type=float, nargs="+", default=[0.1], help="share of the weights of sparse methods")
    found.add_argument("--depth", type=int, nargs="+", default=[20], help="last decoder layers; 0 for all")
    found.add_argument("--seed", type=int, nargs="+", default=[0], help="of the order of the data and of the probe")
    found.add_argument("--epochs", type=float, default=5.0)
    found.add_argument("--batch", type=int, default=128, help="examples of a step, of all devices together")
    found.add_argument("--micro-batch", type=int, default=8, help="examples that a device trains on at once")
    found.add_argument("--test-batch", type=int, default=16, help="questions that a device answers at once")
    found.add_argument("--train-items", type=int, default=tasks.TRAIN_ITEMS, help="0 for all")
    found.add_argument("--items", type=int, default=0, help="test questions a task; 0 for all")
    found.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=FOLDER", help="data sets that are not taken from the hub"
    )
    found.add_argument("--workers", type=int, default=4, help="processes of each device that prepare images")
    found.add_argument("--results", type=Path, default=RESULTS, help="file of rows")
    found.add_argument("--cache", type=Path, default=CACHE, help="full fine-tuning runs, and runs under way")
    return found


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: _run(options), UnknownNameError, DataError, OSError, ValueError)


def _run(options: argparse.Namespace) -> None:
    _check(options)
    state = _join()
    source = Source(options.model, trust_remote_code=options.trust_remote_code)
    folders = _folders(options.data)
    machine = Machine(source, folders, options.cache, options.micro_batch, options.test_batch, options.workers)
    machine.accumulation(options.batch)
    _check_model(source)
    known = rows.finished(rows.read(options.results, runs.run_of), runs.run_of)
    state.wait_for_everyone()  # before one of them writes the first row
    # All data before the first run: what is missing should not be found out after a night of training.
    test = {name: _examples(name, "test", folders, options.items) for name in (*options.upstream, *options.downstream)}
    train = {name: _examples(name, "train", folders, options.train_items) for name in options.downstream}
    for task in options.downstream:
        material = Material(train[task], {name: test[name] for name in (*options.upstream, task)})
        for run in wishes(options, task, material):
            if run not in known:
                _make(run, machine, material, options.results)


def _join() -> PartialState:
    """This process as one of those that ``accelerate launch`` started.

    Raises:
        ValueError: if it was started with others that it cannot reach (each would do all of the work), or the model
            is to be split among them.
    """
    found = join_processes()
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if expected != found.num_processes:
        raise ValueError(
            f"{expected} processes were started, but accelerate found {found.num_processes}: use "
            "`accelerate launch --multi_gpu`, or set ACCELERATE_USE_CPU=true for processes on CPUs"
        )
    return PartialState()


def _examples(name: str, split: Split, folders: dict[str, Path], count: int) -> Examples:
    return tasks.examples(name, split, folders.get(name)).subset(count or None)


def wishes(options: argparse.Namespace, task: str, material: Material) -> list[RealRun]:
    """Every run on a task that is asked for, once."""
    found: dict[RealRun, None] = {}
    for seed, name, lr, rho, depth in product(options.seed, options.method, options.lr, options.rho, options.depth):
        method = METHODS[name]
        trains = bool(method.rates)
        run = RealRun(
            subject=options.model,
            task=task,
            upstream=tuple(options.upstream),
            method=name,
            lr=lr if trains else None,
            epochs=options.epochs if trains else 0.0,
            batch=options.batch if trains else 0,
            train_items=(options.train_items or None) if trains else None,
            seed=seed if trains else 0,
            rho=rho if method.has_rho else None,
            depth=(depth or None) if trains else None,
            items=options.items or None,
            dtype=options.dtype,
            train_data=material.train_data if trains else None,
            test_data=material.test_data,
        )
        found[run] = None
    return list(found)


def _make(run: RealRun, machine: Machine, material: Material, results: Path) -> None:
    state = PartialState()
    if state.is_main_process:
        print(describe(run), file=sys.stderr)
    row = runs.perform(run, machine, material)
    if state.is_main_process:
        rows.append([row], results)
        if row["status"] == OK:
            runs.kept(run, machine).forget()
            found = rows.summary(row["test"], run.task)
            print(", ".join(f"{name} {value:.1f}" for name, value in found.items()), file=sys.stderr)
        else:
            again = ", will be tried again" if row["status"] == FAILED else ""
            print(f"{row['status']}{again}: {row['error']}", file=sys.stderr)
    state.wait_for_everyone()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(run: RealRun) -> str:
    parts = [("lr", run.lr), ("rho", run.rho), ("depth", run.depth), ("seed", run.seed)]
    return ", ".join(
        [f"{run.method} on {run.task}", *(f"{name} {value}" for name, value in parts if value is not None)]
    )


def _folders(pairs: list[str]) -> dict[str, Path]:
    """``NAME=FOLDER`` each.

    Raises:
        UnknownNameError: if there is no such task, or no "=".
    """
    for pair in pairs:
        if "=" not in pair:
            raise UnknownNameError(f"--data takes NAME=FOLDER, such as coco-caption=/data/coco; got {pair!r}")
    found = {name: Path(folder).expanduser() for name, folder in (pair.split("=", 1) for pair in pairs)}
    check_names("data set", list(found), list(tasks.TASKS))
    return found


def _check(options: argparse.Namespace) -> None:
    check_names("downstream task", options.downstream, tasks.DOWNSTREAM)
    check_names("upstream task", options.upstream, tasks.UPSTREAM)
    check_names("method", options.method, list(METHODS))
    positive = {"--lr": min(options.lr), "--epochs": options.epochs}
    positive |= {
        f"--{name}": getattr(options, name.replace("-", "_")) for name in ("batch", "micro-batch", "test-batch")
    }
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("train_items", "items", "workers"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, got {getattr(options, name)}")
    if min(options.depth) < 0 or min(options.seed) < 0:
        raise ValueError("--depth and --seed must not be negative")
    if not all(0 < rho <= 1 for rho in options.rho):
        raise ValueError(f"--rho is a fraction in (0, 1], got {options.rho}")


def _check_model(source: Source) -> None:
    """That it is there, before any data are read.

    Raises:
        OSError: if it is not, with how to get it.
    """
    try:
        load_config(source)
    except (OSError, ValueError) as error:
        hints = [] if source.trust_remote_code else ["A model with code of its own needs --trust-remote-code."]
        if not source.is_local:
            hints.append(
                f"If https://huggingface.co/{source.name} asks to accept terms, do so there and log in with `hf auth "
                "login`; without a network, download it elsewhere and pass the folder as --model."
            )
        raise OSError("\n".join([str(error), *hints])) from error
