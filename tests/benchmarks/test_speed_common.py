"""The harness of the speed benchmarks: its statistics, its bookkeeping, and that peak memory is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.speed import common

CPU = torch.device("cpu")
MIB = 2**20
MEASURED = [{"method": "A", "metric": "step time", "unit": "ms", **common.quantiles([3.0, 1.0, 2.0])}]


def mebibytes(count: int) -> torch.Tensor:
    return torch.ones(count * MIB, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("samples", "median", "q20", "q80"),
    [
        ([7.0], 7.0, 7.0, 7.0),
        ([6.0, 1.0, 5.0, 2.0, 4.0, 3.0], 3.5, 2.0, 5.0),  # 0.2 * 5 = 1 step above the lowest
        ([10.0, 20.0, 40.0], 20.0, 14.0, 32.0),  # 0.4 of the way to the second, 0.6 of that to the third
    ],
)
def test_quantiles(samples: list[float], median: float, q20: float, q80: float) -> None:
    found = common.quantiles(samples)
    assert found["repeats"] == len(samples)
    assert [found[name] for name in ("median", "q20", "q80")] == pytest.approx([median, q20, q80])


def test_actions_take_turns() -> None:
    calls: list[str] = []
    samples = common.interleave(
        {"A": lambda: calls.append("A"), "B": lambda: calls.append("B")}, CPU, repeats=3, warmup=1
    )
    assert calls == ["A", "B"] * 4
    assert [len(times) for times in samples.values()] == [3, 3]


def test_a_spent_budget_still_gives_three_rounds() -> None:
    samples = common.interleave({"A": lambda: None}, CPU, repeats=10, budget_s=0.0)
    assert len(samples["A"]) == 3


def test_peak_memory_of_a_known_sequence() -> None:
    def prepare() -> Callable[[], None]:
        kept = mebibytes(10)
        mebibytes(50)  # dropped again before the action: must not show

        def action() -> None:
            first, second = mebibytes(20), mebibytes(5)  # 35
            del first  # 15
            third = mebibytes(12)  # 27
            del kept_by_action[0], second, third  # freed inside the action although allocated before

        kept_by_action = [kept]
        del kept
        return action

    elsewhere = mebibytes(30)  # alive, but not part of what is measured
    assert common.peak_memory(prepare, CPU) == (10 * MIB, 35 * MIB)
    del elsewhere


def test_peak_memory_sees_temporaries_inside_operators() -> None:
    def prepare() -> Callable[[], torch.Tensor]:
        x = torch.zeros(MIB, dtype=torch.int32).t()
        return lambda: x.sort().values

    # result 4, indices 8 and, inside the operator, at least one more copy of the values
    before, peak = common.peak_memory(prepare, CPU)
    assert before == 4 * MIB and peak >= 16 * MIB


def test_peak_memory_of_a_training_step() -> None:
    def prepare() -> Callable[[], None]:
        weight = torch.nn.Parameter(torch.ones(MIB // 4))
        optimizer = torch.optim.AdamW([weight], fused=True)

        def step() -> None:
            weight.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return step

    before, peak = common.peak_memory(prepare, CPU)
    assert before == pytest.approx(3 * MIB, abs=64)  # weight and two moments; a few scalars beside them
    assert 4 * MIB <= peak <= 4 * MIB + 64  # and the gradient


def test_a_finished_cell_is_known_until_the_commit_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"device": "cpu", "device_name": "some CPU", "threads": 2, "commit": "abc", "dirty": False}
    monkeypatch.setattr(common, "environment", lambda device: dict(machine))
    path, cell = tmp_path / "deeper" / "rows.jsonl", {"shape": "10m", "tokens": 128}
    results = common.Results(path, CPU)
    assert not results.is_finished("step", cell)
    results.add("step", cell, MEASURED)

    again = common.Results(path, CPU)
    assert again.is_finished("step", {"tokens": 128, "shape": "10m"})
    assert not again.is_finished("step", {**cell, "tokens": 512}) and not again.is_finished("probing", cell)
    assert not common.Results(path, CPU, fresh=True).is_finished("step", cell)
    for change in ({"commit": "def"}, {"threads": 1}):
        with monkeypatch.context() as patch:
            patch.setattr(common, "environment", lambda device, change=change: {**machine, **change})
            assert not common.Results(path, CPU).is_finished("step", cell)


def test_rows_of_uncommitted_code_do_not_count_as_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"device": "cpu", "device_name": "some CPU", "threads": 2, "commit": "abc", "dirty": True}
    monkeypatch.setattr(common, "environment", lambda device: machine)
    common.Results(tmp_path / "rows.jsonl", CPU).add("step", {}, MEASURED)
    assert not common.Results(tmp_path / "rows.jsonl", CPU).is_finished("step", {})


def test_a_row_says_everything(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = common.Results(path, CPU).add("step", {"tokens": 8}, MEASURED)
    assert common.load_rows(path) == rows and len(path.read_text().splitlines()) == 1
    assert rows[0].keys() >= {"suite", "configuration", "method", "metric", "unit", "median", "q20", "q80", "repeats"}
    assert rows[0].keys() >= {"run", "device_name", "threads", "versions", "commit", "dirty"}
    assert rows[0]["versions"]["torch"] == torch.__version__ and rows[0]["device"] == "cpu"


def test_readers_take_the_latest_run_of_a_cell() -> None:
    def row(run: str, method: str, tokens: int, device: str = "some CPU") -> dict[str, object]:
        cell = {"suite": "step", "configuration": {"tokens": tokens}, "device_name": device, "threads": 2}
        return {**cell, "run": run, "method": method}

    old = [row("2026-01-01", "A", 8), row("2026-01-01", "B", 8)]
    new = [row("2026-01-02", "A", 8)]  # B was not measured again: its old row belongs to another run
    others = [row("2026-01-01", "A", 16), row("2026-01-01", "A", 8, "some GPU")]
    for rows in (old + new + others, new + others + old):
        found = {json.dumps(row, sort_keys=True) for row in common.latest(rows)}
        assert found == {json.dumps(row, sort_keys=True) for row in new + others}
