"""The switching suite from end to end on a tiny model: rows, resuming, what it measures, the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import switching, tables
from benchmarks.speed.common import RESULTS, Results, Row, load_rows
from benchmarks.speed.shapes import SHAPES, build_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "switching.jsonl"
    switching.run(["tiny"], CPU, Results(path, CPU), repeats=3, budget_s=0)
    return path


@pytest.fixture(scope="module")
def rows(path: Path) -> list[Row]:
    return load_rows(path)


def test_rows(rows: list[Row]) -> None:
    times = {row["method"] for row in rows if row["metric"] == "switch time"}
    assert {f"{name}: unmerge, merge" for name in switching.MERGED} < times
    assert times >= {"merged model: reload", "LoRA, same count: hotswap_adapter", "Dowser: load_adapter"}
    for row in rows:
        assert row["suite"] == "switching" and row["q20"] <= row["median"] <= row["q80"] and row["commit"]


def test_only_dowser_gives_the_base_back(rows: list[Row]) -> None:
    changed = {row["method"]: row["median"] for row in rows if row["metric"] == "base weights changed"}
    assert changed["Dowser"] == changed["Dowser column"] == 0
    assert changed["LoRA, same count"] > 0 and changed["PEFT SHiRA"] > 0


def test_a_finished_cell_is_not_measured_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(path, CPU)
    size = path.stat().st_size
    if load_rows(path)[0]["dirty"]:  # such a row never counts as finished
        monkeypatch.setattr(results, "is_finished", lambda *_: True)
    switching.run(["tiny"], CPU, results, repeats=3, budget_s=0)
    assert path.stat().st_size == size


@pytest.mark.parametrize("method", switching.MERGED)
def test_a_switch_changes_the_answer_and_back(method: str) -> None:
    base = build_llama(SHAPES["tiny"], CPU, torch.float32)
    model: Any = switching.with_two_adapters(method, base)
    ids = torch.arange(6)[None]
    switch, answers = switching.merged_switch(model), []
    for _ in range(3):
        answers.append(model(ids).logits)
        switch()
    assert not torch.equal(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2], rtol=1e-4, atol=1e-4)


def test_the_table_shows_the_committed_rows() -> None:
    table = tables.switching_table(load_rows(RESULTS / "switching.jsonl"))
    assert "Dowser: unmerge, merge" in table and "merged model: reload" in table
