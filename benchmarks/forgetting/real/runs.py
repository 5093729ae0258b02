"""One run on a real model: tune it by one method on one task, test it on all, and tell it as a row.

Adapters are merged before the test: what is tested is what would be deployed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.forgetting.experiment import provenance
from benchmarks.forgetting.methods import METHODS, Batch, Data, Settings, target_modules
from benchmarks.forgetting.real.examples import Examples, micro_batches
from benchmarks.forgetting.real.keeping import Kept, Training
from benchmarks.forgetting.real.metrics import caption_tokenizer
from benchmarks.forgetting.real.subject import Subject, load
from benchmarks.forgetting.real.tasks import TASKS
from benchmarks.forgetting.rows import DIVERGED, FAILED, OK, Row
from dowser_peft.cli.models import Source
from dowser_peft.miniature.training import NonFiniteLossError, Recipe

PACKAGES = ("accelerate", "datasets")
WARMUP = 0.03


@dataclass(frozen=True)
class RealRun:
    """The settings of one run. Whatever plays no part in its method is None or zero, so that equal runs are equal.

    Args:
        subject: hub id or folder of the model.
        task: what is learned.
        upstream: on what else it is tested.
        batch: examples of an optimizer step, of all devices together.
        train_items: the most examples that are learned from; None for all.
        items: the most test questions of a task; None for all.
        dtype: of the base model's weights.
        train_data: tells which examples are learned from, wherever they came from.
        test_data: the same for the questions of all tasks.
    """

    subject: str
    task: str
    upstream: tuple[str, ...]
    method: str
    lr: float | None
    epochs: float
    batch: int
    train_items: int | None
    seed: int
    rho: float | None
    depth: int | None
    items: int | None
    dtype: str
    train_data: str | None
    test_data: str

    @property
    def tasks(self) -> tuple[str, ...]:
        return (*self.upstream, self.task)


KEYS = [field.name for field in dataclasses.fields(RealRun)]


def run_of(row: Row) -> RealRun:
    return RealRun(**{key: tuple(row[key]) if key == "upstream" else row[key] for key in KEYS})


@dataclass(frozen=True)
class Machine:
    """How runs are made here; no part of their identity.

    Args:
        source: where the model comes from.
        folders: of data sets that are not taken from the hub.
        cache: for full fine-tuning runs, tuned weights and answers.
        micro_batch: training examples that one device takes at once.
        test_batch: the same for questions.
        workers: processes of each device that read and prepare images.
    """

    source: Source
    folders: dict[str, Path]
    cache: Path
    micro_batch: int = 8
    test_batch: int = 16
    workers: int = 4

    def accumulation(self, batch: int) -> int:
        """Batches of one device that make a step.

        Raises:
            ValueError: if they cannot make ``batch`` examples.
        """
        at_once = self.micro_batch * PartialState().num_processes
        if batch % at_once:
            raise ValueError(
                f"--batch {batch} is no multiple of --micro-batch {self.micro_batch} times "
                f"{PartialState().num_processes} processes: choose another --micro-batch"
            )
        return batch // at_once


@dataclass(frozen=True)
class Material:
    """The examples of a run, read once for all runs.

    Args:
        train: of the downstream task.
        test: of every task.
    """

    train: Examples
    test: dict[str, Examples]

    @property
    def train_data(self) -> str:
        return _digest(self.train.items)

    @property
    def test_data(self) -> str:
        return _digest([self.test[name].items for name in sorted(self.test)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def perform(run: RealRun, machine: Machine, material: Material) -> Row:
    """The row of a run: its settings, its scores or why it failed, and what made it.

    Raises:
        Exception: whatever went wrong, if several processes take part: they cannot go on without each other.
    """
    state, started = PartialState(), time.perf_counter()
    try:
        outcome = _tune_and_score(run, machine, material)
    except NonFiniteLossError as error:
        outcome = {"status": DIVERGED, "error": str(error)}
    except Exception as error:
        if state.num_processes > 1:
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        outcome = {"status": FAILED, "error": message}
    origin = provenance()
    versions = origin["versions"] | {name: version(name) for name in PACKAGES}
    return {
        **dataclasses.asdict(run),
        **outcome,
        "seconds": round(time.perf_counter() - started, 1),
        "devices": f"{state.num_processes} x {_device_name(state.device)}",
        "micro_batch": machine.micro_batch,
        "caption_tokenizer": caption_tokenizer(),
        "commit": origin["commit"],
        "versions": versions,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _tune_and_score(run: RealRun, machine: Machine, material: Material) -> Row:
    state, memory = PartialState(), kept(run, machine)
    torch.manual_seed(run.seed)
    subject = load(machine.source, run.dtype, state.device)
    model = subject.model
    if memory.has_weights():
        training = memory.restore_weights(model)
    else:
        steps = math.ceil(len(material.train) * run.epochs / run.batch) if run.lr else 0
        data, settings = _data(run, machine, material, subject), _settings(run, machine, steps)
        tuned = METHODS[run.method].tune(model, data, settings)
        trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
        training = Training(steps, trained)
        model = tuned.merge_and_unload() if isinstance(tuned, PeftModel) else tuned
        state.wait_for_everyone()  # all have looked for weights
        if steps and state.is_main_process:
            memory.save_weights(model, target_modules(model, run.depth), training)
    model.eval()
    scores = {name: _score(name, subject, model, material.test[name], machine, memory) for name in run.tasks}
    return {"status": OK, "test": scores, **dataclasses.asdict(training)}


def _settings(run: RealRun, machine: Machine, steps: int) -> Settings:
    recipe = Recipe(
        "cosine", WARMUP, machine.accumulation(run.batch), bfloat16=run.dtype == "bfloat16", accelerate=True
    )
    return Settings(run.lr or 0.0, steps, run.seed, 1.0 if run.rho is None else run.rho, run.depth, recipe)


def _data(run: RealRun, machine: Machine, material: Material, subject: Subject) -> Data:
    state = PartialState()

    def train(count: int, seed: int) -> Iterator[Batch]:
        order = micro_batches(
            len(material.train),
            count,
            machine.micro_batch,
            seed,
            process=state.process_index,
            processes=state.num_processes,
        )
        return iter(_loader(material.train, list(order), subject.lessons, subject, machine))

    def upstream(count: int, seed: int) -> list[Batch]:
        batches = []
        for index, name in enumerate(run.upstream):
            share = count // len(run.upstream) + (index < count % len(run.upstream))
            order = list(micro_batches(len(material.test[name]), share, 1, seed))
            batches += [
                send_to_device(batch, state.device)
                for batch in _loader(material.test[name], order, subject.questions, subject, machine)
            ]
        return batches

    name = f"{run.subject}/{run.task}|{run.train_data}|{run.batch}"
    return Data(name, subject.tokenizer, train, upstream, machine.cache)


def _loader(
    examples: Examples, order: Sequence[list[int]], collate: Any, subject: Subject, machine: Machine
) -> DataLoader:
    workers = machine.workers if subject.can_collate_in_workers else 0
    return DataLoader(examples, batch_sampler=order, collate_fn=collate, num_workers=workers)


def _score(name: str, subject: Subject, model: nn.Module, examples: Examples, machine: Machine, memory: Kept) -> float:
    """The score of one task; every process answers its share of the questions."""
    state, task = PartialState(), TASKS[name]
    answers = memory.answers(name)
    state.wait_for_everyone()  # all have looked for answers
    if answers is None:
        mine = list(range(state.process_index, len(examples), state.num_processes))
        order = [mine[start : start + machine.test_batch] for start in range(0, len(mine), machine.test_batch)]
        batches = _loader(examples, order, subject.questions, subject, machine)
        bar = tqdm(batches, desc=f"test {name}", disable=not state.is_main_process)
        written = [text for batch in bar for text in subject.answers(model, batch, task.new_tokens)]
        numbered = list(zip(mine, written, strict=True))
        answers = [text for _, text in sorted(gather_object(numbered) if state.num_processes > 1 else numbered)]
        if state.is_main_process:
            memory.save_answers(name, answers)
    return round(float(task.score(answers, [references for _, _, references in examples.items])), 3)


def kept(run: RealRun, machine: Machine) -> Kept:
    """What is kept of a run while it has no row."""
    return Kept(machine.cache / "tuned" / _digest(dataclasses.asdict(run)))
