"""One run: tune a base model by one method, test it, and tell it as a row. Nothing that goes wrong escapes."""

from __future__ import annotations

import dataclasses
import subprocess
import time
import traceback
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.forgetting import transforms
from benchmarks.forgetting.methods import METHODS, Settings
from benchmarks.forgetting.miniature import data_of, load_base, score
from benchmarks.forgetting.rows import DIVERGED, FAILED, OK, Row, Run
from dowser_peft.miniature.training import NonFiniteLossError

PACKAGES = ("dowser-peft", "peft", "torch", "transformers")


def perform(run: Run, cache_folder: Path) -> Row:
    """The row of a run: its settings, what it scored or why it failed, and what made it.

    Of a run that succeeded: accuracy per task of the ``test`` and ``validation`` questions in percent,
    ``trained_parameters``, and ``seconds`` of wall time with everything.
    """
    started = time.perf_counter()
    try:
        outcome = _tune_and_score(run, cache_folder)
    except NonFiniteLossError as error:
        outcome = {"status": DIVERGED, "error": str(error)}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        outcome = {"status": FAILED, "error": message}
    seconds = round(time.perf_counter() - started, 1)
    return {"subject": "miniature", **dataclasses.asdict(run), **outcome, "seconds": seconds, **provenance()}


def _tune_and_score(run: Run, cache_folder: Path) -> Row:
    torch.manual_seed(run.seed)
    model, tokenizer = load_base(run.pretraining_seed, cache_folder, run.size)
    transforms.apply(model, run.transform)
    data = data_of(tokenizer, run.pretraining_seed, run.task, cache_folder)
    settings = Settings(run.lr or 0.0, run.steps, run.seed, 1.0 if run.rho is None else run.rho, run.depth)
    tuned = METHODS[run.method].tune(model, data, settings)
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    return {"status": OK, **score(tuned, tokenizer, run.task, run.items), "trained_parameters": trained}


@cache
def provenance() -> Row:
    """Versions, and the commit; "+changes" behind it if tracked Python files differ from it."""
    root = Path(__file__).parent

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip() or None
    if commit and git("diff", "--quiet", "HEAD", "--", ":/*.py").returncode:
        commit += "+changes"
    return {"versions": {name: version(name) for name in PACKAGES}, "commit": commit}
