"""The main job, in short: it runs, measures, saves, and what it saves answers identically."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dowser_peft.cli import app, demo
from dowser_peft.miniature import UPSTREAM

runner = CliRunner()


def test_demo(tmp_path: Path) -> None:
    options = ["--steps", "2", "--items", "4", "--output", str(tmp_path / "out")]
    result = runner.invoke(app, ["demo", *options, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["method"] for row in found["rows"]] == ["before", *demo.LEARNING_RATES]
    for row in found["rows"]:
        assert set(row["old_tasks"]) == set(UPSTREAM)
        assert row["kept"] == pytest.approx(sum(row["old_tasks"].values()) / len(UPSTREAM))
    before, full, _, dowser, decayed = found["rows"]
    assert before["trained_parameters"] == 0
    assert dowser["trained_parameters"] == decayed["trained_parameters"]
    assert dowser["trained_parameters"] == pytest.approx(0.1 * full["trained_parameters"], rel=1e-3)
    assert found["merged_is_identical"] is True
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size == found["adapter_bytes"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


def test_a_bad_rho_fails_before_anything_is_trained(tmp_path: Path) -> None:
    result = runner.invoke(app, ["demo", "--rho", "10", "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "for 10 % write 0.1" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_difference_after_merging_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: here the merge silently does nothing."""
    from dowser_peft.layer import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, **options: None)
    _, model = demo._run("Dowser", 0.1, 2, 4, 0)
    with pytest.raises(RuntimeError, match="merged model answers differently"):
        demo._check_deployment(model, tmp_path, 4, 0)


def test_the_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        demo.Row("before", 0.0, dict.fromkeys(UPSTREAM, 100.0), 0, 0.0),
        demo.Row("full fine-tuning", 100.0, dict.fromkeys(UPSTREAM, 50.0), 2_478_080, 1.0),
        demo.Row("Dowser", 80.0, dict.fromkeys(UPSTREAM, 80.0), 247_808, 1.0),
    ]
    assert rows[0].h_score == 0.0 and rows[1].h_score == pytest.approx(200 / 3) and rows[2].h_score == 80.0
    demo._print_rows(rows)
    printed = capsys.readouterr().out
    assert "50.0 (-50.0)" in printed and "80.0 (-20.0)" in printed and "247,808" in printed
    assert "The old tasks that suffered most" in printed
