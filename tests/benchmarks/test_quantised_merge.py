"""The benchmark of merging on quantised bases: one run in small, and its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import quantised_merge

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantised_merge.probe
    monkeypatch.setattr(quantised_merge, "probe", lambda model, **options: real(model, num_prompts=4, **options))
    monkeypatch.setattr(quantised_merge, "UPSTREAM", ["shape"])


@pytest.mark.usefixtures("quick_probe")
def test_every_form_of_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_merge, "QUANTISATIONS", {"4-bit": quantised_merge.QUANTISATIONS["4-bit"]})
    out = tmp_path / "rows.jsonl"
    small = ["--steps", "3", "--items", "4", "--old-items", "2", "--lr", "0.001", "--out", str(out)]
    quantised_merge.main(small)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["granularity"], row["form"]) for row in rows] == [
        (granularity, form) for granularity in ("element", "column") for form in quantised_merge.FORMS
    ]
    found = {row["form"]: row for row in rows[: len(quantised_merge.FORMS)]}
    again, exact, rounded = (
        found[form] for form in ("quantised again", "dequantised, float32", "dequantised, bfloat16")
    )
    assert exact["logits_error"] < 1e-5 and exact["delta_error"] < 1e-5
    assert exact["logits_error"] < rounded["logits_error"] < again["logits_error"]
    assert exact["delta_error"] < rounded["delta_error"] < again["delta_error"]
    assert exact["new_task"] == found["unmerged"]["new_task"]
    assert "delta_error" not in found["original base, bfloat16"]
    assert quantised_merge.table(out).count("\n") == 1 + len(quantised_merge.FORMS)


def test_4bit_weights_as_a_gpu_dequantises_them() -> None:
    """Each value is the nearest of the code, times the largest of its block of 64, wherever rows end."""
    weight = torch.randn(5, 32 * 3)  # rows of one and a half blocks, and half a block at the end
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    blocks = torch.nn.functional.pad(weight.view(-1), (0, 32)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / largest[..., None] - state.code).abs().argmin(-1)
    expected = (state.code[nearest] * largest).view(-1)[: weight.numel()].view(weight.shape)
    with quantised_merge.exact_4bit():
        torch.testing.assert_close(functional.dequantize_4bit(packed, state), expected)


def test_what_is_kept_of_a_delta() -> None:
    base, delta = {"a": torch.ones(4)}, {"a": torch.tensor([1.0, -2.0, 0.0, 2.0])}
    merged = {"a": base["a"] + torch.tensor([1.0, -2.0, 7.0, 0.5])}  # the third does not train
    kept, error = quantised_merge.kept_of_delta(merged, base, delta)
    assert kept == pytest.approx((1 + 4 + 1) / 9) and error == pytest.approx(1.5 / 3)
