"""The step suite from end to end on a tiny model: rows, resuming, tables, figure."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pages import section
from benchmarks.speed import __main__ as everything
from benchmarks.speed import plot, step, tables
from benchmarks.speed.common import Results, Row, load_rows, quantiles
from benchmarks.speed.peers import METHODS, ON_4BIT
from benchmarks.speed.shapes import SHAPES

CPU = torch.device("cpu")
TOKENS = tables.TOKENS["cpu"]
WEIGHTS = 2 * (4 * 64**2 + 3 * 64 * 128)  # of the tiny shape
CELLS = [
    step.Cell("training", "tiny", TOKENS),
    step.Cell("training", "tiny", 16, rho=0.3),
    step.Cell("training", "tiny", 16, nf4=True),
    step.Cell("training", "tiny", 16, checkpointing=True),
    step.Cell("memory", "tiny", step.ACTIVATION_FREE),
    step.Cell("memory", "tiny", TOKENS),
    step.Cell("training", "tiny", TOKENS, layers=1),
    step.Cell("inference", "tiny", TOKENS),
]


def measure(path: Path, fresh: bool = False) -> None:
    step.run(CELLS, CPU, Results(path, CPU, fresh=fresh), repeats=3, budget_s=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "step.jsonl"
    measure(path)
    return path


@pytest.fixture(scope="module")
def rows(path: Path) -> list[Row]:
    return load_rows(path)


def cell(rows: list[Row], wanted: step.Cell) -> dict[str, Row]:
    found = {"part": wanted.part, "shape": wanted.shape, "tokens": wanted.tokens, "rho": wanted.rho}
    found |= {"layers": wanted.layers, "nf4": wanted.nf4, "checkpointing": wanted.checkpointing}
    return {row["method"]: row for row in rows if {**row["configuration"], "weights": 0} == {**found, "weights": 0}}


def test_every_cell_has_every_method(rows: list[Row]) -> None:
    column = {"Dowser column"} & METHODS.keys()
    expected = [
        {*METHODS, step.GEMMS},
        {*step.SPARSE, step.GEMMS} & {*METHODS, step.GEMMS},
        {*ON_4BIT} & METHODS.keys(),
        {"LoRA, same count", "LoRA r=64", "Dowser", step.GEMMS} | column,
        {*METHODS},
        {*METHODS},
        {*METHODS, step.GEMMS},
        {"base", "Dowser, merged", "PEFT SHiRA", "PEFT Super-Tuning", "LoRA, same count", "LoRA r=64", "PEFT OSF"}
        | {"Dowser"}
        | {name for one in column for name in (one, f"{one}, merged")},
    ]
    for wanted, names in zip(CELLS, expected, strict=True):
        assert cell(rows, wanted).keys() == names, wanted
    assert len(rows) == sum(len(names) for names in expected)


def test_rows_have_what_readers_need(rows: list[Row]) -> None:
    for row in rows:
        assert row["suite"] == "step" and row["device"] == "cpu"
        assert 0 < row["q20"] <= row["median"] <= row["q80"]
        assert row["configuration"]["weights"] == WEIGHTS // (2 if row["configuration"]["layers"] == 1 else 1)
        if row["metric"] == "peak memory":
            assert row["unit"] == "bytes" and row["between_steps"] < row["median"]
        else:
            assert row["unit"] == "ms" and row["repeats"] == len(row["samples"]) == 3
            assert quantiles(row["samples"])["median"] == row["median"]
    timed = cell(rows, CELLS[0])
    assert timed["Dowser"]["trained_parameters"] == 8194 and timed["full fine-tuning"]["trained_parameters"] == WEIGHTS
    for name in METHODS:
        assert (timed[name]["last_loss"] < timed[name]["first_loss"]) == METHODS[name].optimise


def test_held_memory_is_what_the_methods_say(rows: list[Row]) -> None:
    """Weights, Adam states and masks that live between two steps, counted by hand in float32."""
    shape = SHAPES["tiny"]
    # Embedding and head, norms; rotary frequencies and a few scalars are the slack.
    base = 4 * (WEIGHTS + 2 * shape.vocabulary * shape.hidden + (2 * shape.layers + 1) * shape.hidden)
    rank = 8704  # of the same count, see the trained parameters
    held = {
        "dense floor": base,
        "full fine-tuning": base + 8 * WEIGHTS,
        "masked full fine-tuning": base + 8 * WEIGHTS + WEIGHTS,
        "PEFT SHiRA": base + 12 * rank + 8 * rank,  # value and states; two int32 indices
        "LoRA, same count": base + 12 * rank,
    }
    found = cell(rows, CELLS[4])
    assert found["LoRA, same count"]["trained_parameters"] == rank
    for method, expected in held.items():
        assert found[method]["between_steps"] == pytest.approx(expected, abs=4096), method


def test_activations_come_on_top(rows: list[Row]) -> None:
    few, many = cell(rows, CELLS[4]), cell(rows, CELLS[5])
    for method in METHODS:
        # at least the logits and their gradient, in float32
        grown = 2 * 4 * (TOKENS - step.ACTIVATION_FREE) * SHAPES["tiny"].vocabulary
        assert many[method]["median"] > few[method]["median"] + grown


def test_finished_cells_are_skipped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = [{**row, "dirty": False} for row in load_rows(path)]
    again = path.with_name("again.jsonl")
    again.write_text("".join(json.dumps(row) + "\n" for row in clean[: -len(cell(clean, CELLS[-1]))]))
    called = []
    for part in step.PARTS:
        monkeypatch.setitem(step.PARTS, part, lambda cell, *_: called.append(cell) or [])
    measure(again)
    assert called == [CELLS[-1]]
    called.clear()
    measure(again, fresh=True)
    assert called == CELLS


def test_what_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step.Cell, "fits", lambda *_: False)
    measure(tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_the_methods_table(rows: list[Row]) -> None:
    text = tables.methods_table(rows)
    assert text.startswith(f"{rows[0]['device_name']} ({torch.get_num_threads()} threads), float32, 0M target weights")
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = {line[0].removeprefix("| "): line for line in table}
    assert [name for name in found if name in METHODS] == list(METHODS)
    timed, bare = cell(rows, CELLS[0]), cell(rows, CELLS[4])
    pairs = zip(timed["Dowser"]["samples"], timed["dense floor"]["samples"], strict=True)
    middle = sorted(one / other for one, other in pairs)[1]
    assert found["Dowser"][1] == "8,194" and found["Dowser"][2].startswith(f"{middle:.2f} (")
    assert found["Dowser"][3] == f"{bare['Dowser']['median'] / 2**20:,.0f} MiB"
    assert found["dense floor"][1:3] == ["", "1.00 (1.00 to 1.00)"] and found[step.GEMMS][1] == ""


def test_the_targets_table(rows: list[Row]) -> None:
    lines = tables.targets_table(rows).splitlines()[2:]
    bare = cell(rows, CELLS[4])
    memory = bare["Dowser"]["median"] / bare["masked full fine-tuning"]["median"]
    wanted = "| Dowser: peak memory without activations | masked full fine-tuning | 0.40 | "
    assert f"{wanted}{memory:.2f} | tiny, {step.ACTIVATION_FREE} |" in lines
    known = sum(target.method in METHODS or target.part == "inference" for target in tables.TARGETS)
    left_out = sum(target.nf4 for target in tables.TARGETS)  # measured at 16 tokens only
    assert len(lines) == known - (left_out if "Dowser column" in METHODS else 0)


def test_tables_take_the_largest_model_and_the_latest_run(rows: list[Row]) -> None:
    def changed(row: Row, **configuration: object) -> Row:
        return {**row, "configuration": {**row["configuration"], **configuration}, "run": "9999-01-01"}

    grown = [changed(row, shape="33m", weights=32_112_640) for row in rows if not row["configuration"]["layers"]]
    (found,) = tables.by_machine([*grown, *rows])
    assert "32M target weights" in tables.methods_table(found) and "| 33m," in tables.targets_table(found)
    renewed = [{**changed(row), "trained_parameters": 12345} for row in cell(rows, CELLS[0]).values()]
    (found,) = tables.by_machine([*rows, *renewed])
    assert "| 12,345 |" in tables.methods_table(found) and "| 8,194 |" not in tables.methods_table(found)


@pytest.mark.parametrize(("path", "text"), [(tables.README, tables.summary), (tables.DETAILS, tables.details)])
def test_the_pages_show_the_committed_rows(path: Path, text: Callable[[], str]) -> None:
    assert section(path.read_text(), tables.SECTION) == text()


def test_fitted_exponents() -> None:
    sizes = [1e6, 3e6, 1e7]
    assert plot.exponent(sizes, [size**1.5 / 7 for size in sizes]) == pytest.approx(1.5)


def test_growth_is_read_along_one_axis(rows: list[Row]) -> None:
    points = plot.growth(rows, "training", "Dowser", "rho", shape="tiny", tokens=16)
    assert points[0][0] == 0.3 and len(points) == 1  # the other cells of 16 tokens are 4-bit or checkpointed
    sizes = [point[0] for point in plot.growth(rows, "training", "Dowser", "weights", tokens=TOKENS)]
    assert sizes == [WEIGHTS / 2, WEIGHTS]


@pytest.mark.filterwarnings("error")
def test_the_figure(path: Path, tmp_path: Path) -> None:
    plot.main(["--rows", str(path), "--out", str(tmp_path / "figures")])
    drawn = tmp_path / "figures" / "step-cpu.png"
    assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size < 200_000


def test_the_gemms_are_those_of_a_dense_step() -> None:
    with FlopCounterMode(display=False) as counter:
        step.gemms([torch.zeros(6, 4), torch.zeros(4, 10)], tokens=3)()
    assert counter.get_total_flops() == 3 * 2 * 3 * (6 * 4 + 4 * 10)


def test_the_command_line_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[step.Cell]] = []
    monkeypatch.setattr(step, "run", lambda cells, *_, **__: seen.append(cells))
    options = ["--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]
    step.main([*options, "--part", "training", "--shape", "33m", "--tokens", "512", "--rho", "0.1", "--base", "dense"])
    assert seen == [[step.Cell("training", "33m", 512)]]
    step.main(options)
    assert seen[1] == step.cells(CPU) and len(set(seen[1])) == len(seen[1])


def test_the_cells_for_a_gpu() -> None:
    cells = step.cells(torch.device("cuda"))
    assert len(set(cells)) == len(cells)
    full_depth = [cell for cell in cells if cell.checkpointing]
    assert {(cell.part, cell.nf4) for cell in full_depth} == {
        (part, nf4) for part in ("training", "memory") for nf4 in (False, True)
    }
    for cell in full_depth:
        assert (cell.shape, cell.layers, cell.tokens) == ("7b", None, 2048)
        assert math.isclose(cell.weights(), 6.5e9, rel_tol=0.01)


def test_one_command_runs_the_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(everything.subprocess, "run", lambda command, check: commands.append(command[1:]))
    everything.main(["--device", "cpu", "--fresh"])
    assert [command[1] for command in commands] == [f"benchmarks.speed.{name}" for name in everything.SUITES]
    for command in commands:
        module = importlib.import_module(command[1])
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr("sys.argv", [command[1], *command[2:], "--help"])  # accepts all options before it
            module.main()
        assert ended.value.code == 0
    commands.clear()
    everything.main(["step"])
    assert commands == [["-m", "benchmarks.speed.step", "--device", "auto"]]
