"""Rows outlive being killed, and a run is made once."""

from __future__ import annotations

import dataclasses
from threading import Thread

import pytest

from benchmarks.forgetting import rows
from benchmarks.forgetting.rows import DIVERGED, FAILED, OK, Run

RUN = Run(0, "style", "dowser", 1e-3, 100, 0, 0.1, None, 200)


def _row(run=RUN, status=OK):
    return {**dataclasses.asdict(run), "status": status}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "results" / "runs.jsonl"
    other = dataclasses.replace(RUN, lr=2e-3)
    rows.append([_row()], path)
    rows.append([_row(other)], path)
    assert [rows.run_of(row) for row in rows.read(path)] == [RUN, other]
    assert rows.read(tmp_path / "nothing.jsonl") == []


def test_a_torn_last_line_costs_only_itself(tmp_path):
    path = tmp_path / "runs.jsonl"
    rows.append([_row()], path)
    with path.open("a") as file:
        file.write('{"pretraining_seed": 0, "task": "sty')
    assert len(rows.read(path)) == 1
    rows.append([_row(dataclasses.replace(RUN, seed=1))], path)
    assert len(rows.read(path)) == 2
    assert path.read_text().count("\n") == 2


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "runs.jsonl"
    rows.append([_row()], path)
    path.write_text(path.read_text().rstrip())
    other = dataclasses.replace(RUN, seed=1)
    rows.append([_row(other)], path)
    assert [rows.run_of(row) for row in rows.read(path)] == [RUN, other]


def test_a_second_study_cannot_write_in_between(tmp_path, monkeypatch):
    """While the first one mends a torn line."""
    path = tmp_path / "runs.jsonl"
    path.write_text('{"torn')
    others = []

    def is_json(line):
        if not others:
            others.append(Thread(target=rows.append, args=([_row(dataclasses.replace(RUN, seed=1))], path)))
            others[0].start()
            others[0].join(timeout=0.3)
        return False

    monkeypatch.setattr(rows, "_is_json", is_json)
    rows.append([_row()], path)
    others[0].join()
    assert {row["seed"] for row in rows.read(path)} == {0, 1}


def test_a_damaged_line_inside_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"broken\n{}\n')
    with pytest.raises(ValueError, match="line 1 is damaged"):
        rows.read(path)


def test_the_last_row_of_a_run_counts(tmp_path):
    path = tmp_path / "runs.jsonl"
    rows.append([_row(status=FAILED), _row(status=OK)], path)
    assert [row["status"] for row in rows.read(path)] == [OK]


def test_only_what_failed_is_tried_again():
    runs = [dataclasses.replace(RUN, seed=seed) for seed in range(3)]
    found = rows.finished([_row(run, status) for run, status in zip(runs, (OK, DIVERGED, FAILED), strict=True)])
    assert found == set(runs[:2])


def test_summary_by_hand():
    """Upstream (90 + 60) / 2 = 75, downstream 50: H = 2 * 75 * 50 / 125 = 60."""
    assert rows.summary({"digit": 90.0, "copy": 60.0, "style": 50.0}, "style") == {
        "downstream": 50.0,
        "upstream": 75.0,
        "h": pytest.approx(60.0),
    }
    assert rows.h_score(0.0, 0.0) == 0.0
