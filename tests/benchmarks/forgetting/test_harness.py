"""The harness without its processes: what is made, what is kept, what is told."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.forgetting import __main__ as command
from benchmarks.forgetting import experiment, harness, protocol, rows
from benchmarks.forgetting.methods import METHODS
from benchmarks.forgetting.protocol import Case, Stage
from benchmarks.forgetting.rows import DIVERGED, FAILED, OK
from dowser_peft.miniature import UPSTREAM
from dowser_peft.miniature.training import NonFiniteLossError

ROOT = Path(__file__).parents[3]
CASE = Case("dowser", "style", 4)
RUNS = [CASE.run(lr, 0, 0) for lr in (1e-3, 2e-3, 4e-3)]
STAGE = Stage("a stage", lambda known: RUNS)


@pytest.fixture
def made(monkeypatch):
    """Runs that were performed, by threads of this process; ``made.fails`` says how some end."""

    class Made(list):
        fails: dict = {}

    performed = Made()

    def perform(run, cache):
        performed.append(run)
        status = performed.fails.get(run.lr, OK)
        scores = dict.fromkeys([*UPSTREAM, "style"], 50.0)
        outcome = {"test": scores, "validation": scores} if status == OK else {"error": "no number"}
        return {**dataclasses.asdict(run), "status": status, **outcome}

    @contextmanager
    def threads(workers):
        with ThreadPoolExecutor(1) as executor:
            yield executor

    monkeypatch.setattr(harness, "perform", perform)
    monkeypatch.setattr(harness, "pool", threads)
    return performed


def test_every_run_leaves_a_row_and_is_not_made_again(made, tmp_path):
    path = tmp_path / "runs.jsonl"
    harness.make([STAGE], path, tmp_path, 1)
    harness.make([STAGE], path, tmp_path, 1)
    assert made == RUNS
    assert [rows.run_of(row) for row in rows.read(path)] == RUNS


def test_a_failure_lets_the_rest_go_on_and_is_tried_again_next_time(made, tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    made.fails = {1e-3: FAILED, 2e-3: DIVERGED}
    assert harness.make([STAGE], path, tmp_path, 1) == 1
    assert made == RUNS
    told = capsys.readouterr().err
    assert "dowser on style, lr 0.001, seeds 0/0: failed, will be tried again: no number" in told
    assert "lr 0.002, seeds 0/0: diverged: no number" in told
    made.fails = {}
    assert harness.make([STAGE], path, tmp_path, 1) == 0
    assert made == [*RUNS, RUNS[0]]
    assert [row["status"] for row in rows.read(path)] == [OK, DIVERGED, OK]


def test_a_stage_is_asked_until_it_wants_nothing_new(made, tmp_path):
    growing = Stage("growing", lambda known: RUNS[: len(known) + 1])
    harness.make([growing], tmp_path / "runs.jsonl", tmp_path, 1)
    assert made == RUNS


def test_rows_are_safe_when_the_harness_is_killed(made, tmp_path, monkeypatch):
    path = tmp_path / "runs.jsonl"
    keep = harness.keep

    def killed(row, results):
        keep(row, results)
        if row["lr"] == 2e-3:
            raise KeyboardInterrupt

    monkeypatch.setattr(harness, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        harness.make([STAGE], path, tmp_path, 1)
    assert [row["lr"] for row in rows.read(path)] == [1e-3, 2e-3]


def test_a_killed_worker_is_explained():
    broken: Future = Future()
    broken.set_exception(BrokenProcessPool())

    class Executor:
        def submit(self, *arguments):
            return broken

    with pytest.raises(RuntimeError, match="want of memory.*start again"):
        harness.perform_all(Executor(), "work", [(1.0, print, ())], print)


def test_workers_end_with_a_harness_that_is_killed_outright():
    script = (
        "import os, time\n"
        "from benchmarks.forgetting import harness\n"
        "with harness.pool(1) as executor:\n"
        "    print(executor.submit(os.getpid).result(), flush=True)\n"
        "    executor.submit(time.sleep, 300).result()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert _is_alive(worker)
        parent.kill()
    for _ in range(100):
        if not _is_alive(worker):
            return
        time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the harness")


def test_workers_end_at_once_when_the_harness_is_interrupted():
    with pytest.raises(KeyboardInterrupt), harness.pool(1) as executor:
        worker = executor.submit(os.getpid).result()
        executor.submit(time.sleep, 300)
        raise KeyboardInterrupt
    assert not _is_alive(worker)


def _is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# --- one run


@pytest.fixture
def stub(monkeypatch):
    """A run of a method that is given, on a model that is a single layer."""
    monkeypatch.setattr(experiment, "load_base", lambda seed, cache, size: (torch.nn.Linear(2, 3), None))
    monkeypatch.setattr(experiment, "data_of", lambda *arguments: None)
    monkeypatch.setattr(experiment, "score", lambda model, *arguments: {"test": {"style": 1.0}, "validation": {}})

    def use(tune):
        monkeypatch.setitem(METHODS, "dowser", dataclasses.replace(METHODS["dowser"], tune=tune))

    return use


def test_a_row_tells_settings_scores_and_origin(stub, tmp_path):
    seen = []
    stub(lambda model, data, settings: seen.append(settings) or model)
    row = experiment.perform(RUNS[0], tmp_path)
    assert rows.run_of(row) == RUNS[0]
    assert (row["status"], row["test"], row["trained_parameters"]) == (OK, {"style": 1.0}, 9)
    assert set(row["versions"]) == {"dowser-peft", "peft", "torch", "transformers"}
    assert (seen[0].lr, seen[0].steps, seen[0].rho, seen[0].depth) == (1e-3, 100, 0.1, None)


def test_a_loss_that_is_no_number_is_a_row(stub, tmp_path):
    def diverge(model, data, settings):
        raise NonFiniteLossError("the loss became nan at step 7 of 100 with lr=0.001")

    stub(diverge)
    row = experiment.perform(RUNS[0], tmp_path)
    assert (row["status"], row["error"]) == (DIVERGED, "the loss became nan at step 7 of 100 with lr=0.001")
    assert "test" not in row


def test_any_other_error_is_a_row_that_says_where(stub, tmp_path):
    stub(lambda model, data, settings: {}["nothing"])
    row = experiment.perform(RUNS[0], tmp_path)
    assert row["status"] == FAILED
    assert row["error"].startswith("KeyError: 'nothing' (test_harness.py, line ")


def test_the_commit_says_if_the_code_was_changed(monkeypatch):
    def answers(changed):
        def run(arguments, **options):
            is_diff = arguments[1] == "diff"
            return subprocess.CompletedProcess(arguments, int(changed and is_diff), "" if is_diff else "abc1234\n")

        return run

    for changed, expected in ((False, "abc1234"), (True, "abc1234+changes")):
        monkeypatch.setattr(experiment.subprocess, "run", answers(changed))
        experiment.provenance.cache_clear()
        assert experiment.provenance()["commit"] == expected
    experiment.provenance.cache_clear()


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["man"], "unknown study 'man'. Did you mean 'main'? There are: main, ablations"),
        (["main", "--methods", "dowzer"], "unknown method 'dowzer'. Did you mean 'dowser'? There are: zero-shot"),
        (["main", "--tasks", "pottery"], "unknown task 'pottery'. There are: rename, style, mirror"),
        (["main", "--workers", "0"], "--workers and --items must be positive"),
        (["main", "--items", "0"], "--workers and --items must be positive"),
        (["main", "--seeds", "-1"], "seeds not negative"),
        (["main", "--methods", "wanda"], "study main has no runs of these methods and tasks"),
        (["regimes", "--tasks", "mirror"], "study regimes has no runs of these methods and tasks"),
    ],
)
def test_bad_input_is_explained(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_stability_measures_the_seeds_that_have_no_rows(capsys, tmp_path):
    path = tmp_path / "stability.jsonl"
    rows.append([{"pretraining_seed": 0, "seed": 0, "source": "magnitude"}], path)
    for seeds, runs in ((["0"], 0), (["0", "1"], 1)):
        arguments = ["--pretraining-seeds", "0", "--seeds", *seeds, "--results", str(path), "--dry-run"]
        assert command.main(["stability", *arguments]) == 0
        assert f"{runs} runs" in capsys.readouterr().out


def test_the_dry_run_shows_the_cost(capsys, made):
    assert command.main(["main", "--tasks", "style", "--methods", "dowser", "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:4] == ["main,", "style:", "sweep", "4"]
    assert shown[-1].startswith("total") and " 16 runs" in shown[-1]
    assert made == []


def test_a_study_from_the_command_line(made, tmp_path):
    results = tmp_path / "runs.jsonl"
    arguments = ["main", "--tasks", "style", "--methods", "lora", "--pretraining-seeds", "0", "--seeds", "0"]
    assert command.main([*arguments, "--items", "4", "--results", str(results), "--cache", str(tmp_path)]) == 0
    assert {run.method for run in made} == {"lora"}
    assert len(rows.read(results)) == len(made) >= len(METHODS["lora"].rates)


def test_a_command_with_failures_says_so(made, tmp_path, capsys):
    made.fails = {1e-3: FAILED}
    arguments = ["main", "--tasks", "style", "--methods", "dowser", "--pretraining-seeds", "0", "--seeds", "0"]
    assert command.main([*arguments, "--results", str(tmp_path / "runs.jsonl"), "--cache", str(tmp_path)]) == 2
    assert "error: 1 runs failed, as said above; started again" in capsys.readouterr().err


def test_quick_prints_a_table_and_keeps_nothing(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "runs.jsonl")
    assert command.main(["--quick", "--workers", "1"]) == 0
    assert len(made) == len(protocol.QUICK)
    shown = capsys.readouterr().out
    assert "| Dowser | 0.001 | 50.0 | 50.0 | 50.0 |  | 1 |" in shown
    assert not (tmp_path / "runs.jsonl").exists()
