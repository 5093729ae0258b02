"""The whole command on tiny models and data: rows, resuming, several processes, what goes wrong, the table."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from benchmarks.forgetting import __main__ as benchmark
from benchmarks.forgetting import report, rows
from benchmarks.forgetting.methods import METHODS
from benchmarks.forgetting.real import command, runs, tasks
from benchmarks.forgetting.real import report as real_report
from dowser_peft.miniature.training import NonFiniteLossError
from tests.benchmarks.forgetting.real_fixtures import gqa, image_net_r, save_llava, save_vila

ROOT = Path(__file__).parents[3]
HELD_OUT = 8


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A test part that fits the fixtures; accelerate forgets this process afterwards."""
    monkeypatch.setitem(tasks.TASKS, "imagenet-r", dataclasses.replace(tasks.TASKS["imagenet-r"], held_out=HELD_OUT))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_llava(folder / "llava")
    gqa(folder / "gqa")
    image_net_r(folder / "imagenet-r", 24)
    return folder


def _arguments(material, out, *more, model="llava"):
    data = [f"{name}={material / name}" for name in ("imagenet-r", "gqa")]
    fixed = ["--model", str(material / model), "--downstream", "imagenet-r", "--upstream", "gqa", "--data", *data]
    fixed += ["--results", str(out / "real.jsonl"), "--cache", str(out / "cache"), "--workers", "0"]
    return ["real", *fixed, "--depth", "0", "--batch", "8", "--micro-batch", "4", "--lr", "2e-2", *more]


def _rows(out):
    return rows.read(out / "real.jsonl", runs.run_of)


def test_from_the_command_line_to_the_table(material, tmp_path, capsys):
    """One downstream task, one upstream task, three methods. The new task is so simple that the tiny model learns it
    from its images; a sparse method that trains nothing, or another one's weights, would not."""
    more = ["--method", "zero-shot", "full", "lora", "--epochs", "8", "--batch", "4"]
    arguments = _arguments(material, tmp_path, *more)
    assert benchmark.main(arguments[1:]) == 0  # --model says enough
    zero, tuned, lora = _rows(tmp_path)
    assert zero["test"] == {"gqa": 0.0, "imagenet-r": 0.0} and zero["trained_parameters"] == 0
    assert (zero["lr"], zero["rho"], zero["depth"], zero["steps"], zero["epochs"]) == (None, None, None, 0, 0.0)
    assert tuned["test"]["imagenet-r"] == 100.0
    assert (tuned["steps"], tuned["trained_parameters"], tuned["depth"]) == (32, 3840, None)
    assert tuned["subject"] == str(material / "llava") and tuned["dtype"] == "bfloat16"
    assert {"peft", "torch", "transformers", "datasets", "accelerate"} <= set(tuned["versions"])
    assert lora["status"] == "ok" and lora["trained_parameters"] < 3840
    assert not list((tmp_path / "cache" / "tuned").iterdir())

    assert benchmark.main(["report", "--results", str(tmp_path / "real.jsonl")]) == 0
    table = (tmp_path / "tables.md").read_text()
    assert "8 epochs of 10000 examples, batch 4, bfloat16; all questions." in table
    assert "|  | lr | rho | last layers | GQA | ImageNet-R | upstream | H | n |" in table
    assert "| Zero-shot |  |  |  | 0.0 | 0.0 | 0.0 | 0.0 | 1 |" in table
    assert "| Full fine-tuning | 0.02 |  | all | 33.3 | 100.0 | 33.3 | 50.0 | 1 |" in table  # it saw a bee in GQA too

    capsys.readouterr()
    assert benchmark.main(arguments) == 0  # nothing is made twice
    assert "on imagenet-r" not in capsys.readouterr().err
    assert (tmp_path / "real.jsonl").read_text().count("\n") == 3


def test_nvila_with_code_of_its_own(material, tmp_path, capsys, monkeypatch):
    save_vila(material / "vila")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = _arguments(material, tmp_path, "--method", "dowser", "tailor", "--epochs", "1", model="vila")
    assert benchmark.main(arguments) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert benchmark.main([*arguments, "--trust-remote-code"]) == 0
    assert [(row["method"], row["status"], row["rho"]) for row in _rows(tmp_path)] == [
        ("dowser", "ok", 0.1),
        ("tailor", "ok", 0.1),
    ]


def test_a_run_killed_in_its_test_is_not_trained_again(material, tmp_path, monkeypatch):
    arguments = _arguments(material, tmp_path, "--method", "full", "--epochs", "15", "--dtype", "float32")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tasks.Task, "score", killed)
        assert benchmark.main(arguments) == 130
    assert _rows(tmp_path) == []
    (kept,) = (tmp_path / "cache" / "tuned").iterdir()
    assert {path.name for path in kept.iterdir()} == {"weights.safetensors", "gqa.json"}

    monkeypatch.setitem(METHODS, "full", dataclasses.replace(METHODS["full"], tune=killed))
    assert benchmark.main(arguments) == 0
    (row,) = _rows(tmp_path)
    assert (row["test"]["imagenet-r"], row["steps"], row["trained_parameters"]) == (100.0, 30, 3840)


def test_a_loss_that_is_no_number_ends_its_row_alone(material, tmp_path, monkeypatch):
    def diverge(model, data, settings):
        raise NonFiniteLossError("the loss became nan at step 1 of 2 with lr=0.02")

    monkeypatch.setitem(METHODS, "dowser", dataclasses.replace(METHODS["dowser"], tune=diverge))
    arguments = _arguments(material, tmp_path, "--method", "dowser", "zero-shot")
    assert benchmark.main(arguments) == 0
    first, second = _rows(tmp_path)
    assert (first["status"], first["error"]) == ("diverged", "the loss became nan at step 1 of 2 with lr=0.02")
    assert second["status"] == "ok"
    assert "| Dowser | 0.02 | 0.1 | all | diverged |  |  |  | 0 |" in real_report.write_tables([first, second])
    assert benchmark.main(arguments) == 0
    assert len((tmp_path / "real.jsonl").read_text().splitlines()) == 2


def test_any_other_failure_is_told_and_tried_again(material, tmp_path, monkeypatch, capsys):
    def fail(model, data, settings):
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "dowser", dataclasses.replace(METHODS["dowser"], tune=fail))
        assert benchmark.main(_arguments(material, tmp_path, "--epochs", "1")) == 0
    assert (
        "failed, will be tried again: RuntimeError: CUDA out of memory (test_real_command.py"
        in capsys.readouterr().err
    )
    assert benchmark.main(_arguments(material, tmp_path, "--epochs", "1")) == 0
    assert [row["status"] for row in _rows(tmp_path)] == ["ok"]


def test_two_processes_train_what_one_trains(material, tmp_path):
    """Masks aside, which the probe chooses: so here full fine-tuning."""
    more = ["--method", "full", "--epochs", "2", "--dtype", "float32"]
    assert benchmark.main(_arguments(material, tmp_path / "one", *more)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    arguments = _arguments(material, tmp_path / "two", *more, "--micro-batch", "2")
    script = (
        "import dataclasses, sys\n"
        "from benchmarks.forgetting import __main__ as benchmark\n"
        "from benchmarks.forgetting.real import tasks\n"
        "task = tasks.TASKS['imagenet-r']\n"
        f"tasks.TASKS['imagenet-r'] = dataclasses.replace(task, held_out={HELD_OUT})\n"
        "sys.exit(benchmark.main(sys.argv[1:]))\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    (one,), (two,) = _rows(tmp_path / "one"), _rows(tmp_path / "two")
    assert two["devices"] == "2 x cpu"
    for name in ("steps", "test", "train_data", "test_data", "trained_parameters"):
        assert one[name] == two[name], name
    (first,) = (tmp_path / "one" / "cache" / "full").glob("*.safetensors")
    (second,) = (tmp_path / "two" / "cache" / "full").glob("*.safetensors")
    expected, found = load_file(first), load_file(second)
    assert all(value.abs().max() > 1e-3 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


def test_processes_that_do_not_find_each_other_are_refused(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert benchmark.main(_arguments(material, tmp_path)) == 2
    assert "2 processes were started, but accelerate found 1" in capsys.readouterr().err
    assert not (tmp_path / "real.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--downstream", "imagenet"],
            "unknown downstream task 'imagenet'. Did you mean 'imagenet-r'? There are: coco",
        ),
        (
            ["--upstream", "textvkwa"],
            "unknown upstream task 'textvkwa'. Did you mean 'textvqa'? There are: textvqa, mm",
        ),
        (["--method", "dowzer"], "unknown method 'dowzer'. Did you mean 'dowser'? There are: zero-shot"),
        (["--data", "gqb=/"], "unknown data set 'gqb'. Did you mean 'gqa'?"),
        (["--data", "/data/gqa"], "--data takes NAME=FOLDER, such as coco-caption=/data/coco; got '/data/gqa'"),
        (["--data", "gqa=/no/such/folder"], "gqa: there is no folder '/no/such/folder'; check --data gqa=FOLDER"),
        (["--batch", "6"], "--batch 6 is no multiple of --micro-batch 4 times 1 processes"),
        (["--rho", "10"], "--rho is a fraction in (0, 1], got [10.0]"),
        (["--lr", "0"], "--lr must be positive, got 0.0"),
        (["--model", "/no/such/folder"], "no model folder at '/no/such/folder'"),
        (["--model", "someone/gated"], "`hf auth login`; without a network, download it elsewhere"),
    ],
)
def test_bad_input_is_explained(material, tmp_path, more, message, capsys):
    assert benchmark.main(_arguments(material, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_the_defaults_are_the_papers():
    options = command.parser().parse_args(["--model", "m", "--downstream", "coco-caption"])
    assert (options.lr, options.rho, options.depth, options.epochs) == ([2e-5], [0.1], [20], 5.0)
    assert (options.batch, options.train_items, options.items) == (128, 10_000, 0)
    assert set(options.upstream) == {"textvqa", "mmbench-en", "mmbench-cn", "gqa", "ocrvqa", "okvqa"}
    run = runs.RealRun("m", "gqa", (), "dowser", 2e-5, 5.0, 128, None, 0, 0.1, 20, None, "bfloat16", "", "")
    recipe = runs._settings(run, runs.Machine(None, {}, Path(), micro_batch=8), 10).recipe
    assert (recipe.schedule, recipe.warmup, recipe.accumulation, recipe.bfloat16) == ("cosine", 0.03, 16, True)


# --- the table


def _row(method, seed=0, old=50.0, new=75.0, **changes):
    trains = bool(METHODS[method].rates)
    run = runs.RealRun(
        subject="hub/model",
        task="coco-caption",
        upstream=("gqa", "okvqa"),
        method=method,
        lr=2e-5 if trains else None,
        epochs=5.0 if trains else 0.0,
        batch=128 if trains else 0,
        train_items=10_000 if trains else None,
        seed=seed,
        rho=0.1 if METHODS[method].has_rho else None,
        depth=20 if trains else None,
        items=None,
        dtype="bfloat16",
        train_data="a" if trains else None,
        test_data="b",
    )
    scores = {"gqa": old, "okvqa": old + 10, "coco-caption": new}
    return {**dataclasses.asdict(run), "status": "ok", "test": scores, **changes}


def test_the_table_by_hand():
    """Upstream 55 and 65, downstream 75 and 85: H is 2 * 55 * 75 / 130 = 63.46 and 2 * 65 * 85 / 150 = 73.67."""
    found = [_row("dowser"), _row("dowser", 1, 60.0, 85.0), _row("zero-shot", new=0.0), _row("full", status="failed")]
    found.append(_row("super-top", status="diverged"))
    shown = real_report.write_tables(found)
    assert "### hub/model, COCO-Caption" in shown
    line = "| Dowser | 2e-05 | 0.1 | 20 | 55.0 ± 7.1 | 65.0 ± 7.1 | 80.0 ± 7.1 | 60.0 ± 7.1 | 68.6 ± 7.2 | 2 |"
    assert line in shown
    assert "| Zero-shot |  |  |  | 50.0 | 60.0 | 0.0 | 55.0 | 0.0 | 1 |" in shown
    assert "| Super-Tuning (largest \\|W\\|) | 2e-05 | 0.1 | 20 | diverged |  |  |  |  | 0 |" in shown
    assert "Full" not in shown


def test_other_ways_to_train_are_other_tables_with_the_same_zero_shot():
    found = [_row("dowser"), _row("dowser", epochs=1.0), _row("zero-shot"), _row("zero-shot", test_data="c")]
    shown = real_report.write_tables(found)
    assert shown.count("###") == 2 and shown.count("| Dowser |") == 2 and shown.count("| Zero-shot |") == 2


def test_rows_of_real_models_join_the_report_of_the_miniature(tmp_path):
    miniature = json.loads((ROOT / "benchmarks/forgetting/results/runs.jsonl").read_text().splitlines()[0])
    rows.append([miniature], tmp_path / "runs.jsonl")
    rows.append([_row("dowser")], tmp_path / "real.jsonl")
    report.write(tmp_path / "runs.jsonl")
    text = (tmp_path / "tables.md").read_text()
    assert "## style" in text and "### hub/model, COCO-Caption" in text
