"""The memory account: equal to a measured model, and the claims that README takes from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed import accounting
from benchmarks.speed.account import account, model_config, optimizer_states, optimizer_temporary
from benchmarks.speed.accounting_check import ADAPT, measure
from benchmarks.speed.shape_layers import Element, Setting
from benchmarks.speed.storage_tracker import TEMPORARY, StorageTracker, profiled_peak_bytes
from dowser_peft.base_layer import base_weight

STATIC = ("trained_parameters", "base_weights", "values", "masks", "indices", "optimizer_states", "gradients")
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
# What the replay does not see, or sees in another order, as a fraction of the peak.
DYNAMIC = 0.03


@pytest.fixture(autouse=True)
def one_square_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.accounting_check.SQUARE", SMALL)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ADAPT)
def test_account_equals_measurement(method: str, checkpointing: bool) -> None:
    config = transformers.LlamaConfig(**SMALL)
    setting: dict[str, Any] = {"base": "float32", "tokens": 128, "checkpointing": checkpointing, "rank": 8}
    expected = account(config, method, rho=0.125, device="cpu", **setting)
    measured = measure(config, method, **setting)
    for term in STATIC:
        assert getattr(expected, term) == getattr(measured, term), term
    assert expected.activations + expected.temporary == pytest.approx(measured.activations, rel=DYNAMIC)
    # AdamW's scalars besides
    assert expected.optimizer_temporary == pytest.approx(measured.optimizer_temporary, abs=64)


def test_grouped_heads_in_bfloat16_with_a_batch() -> None:
    shape = SMALL | {"intermediate_size": 344, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**shape)
    setting: dict[str, Any] = {"base": "bfloat16", "tokens": 48, "batch": 2, "checkpointing": False}
    expected = account(config, "Dowser", rho=0.125, device="cpu", **setting)
    measured = measure(config, "Dowser", **setting)
    assert [getattr(expected, term) for term in STATIC] == [getattr(measured, term) for term in STATIC]
    assert expected.activations + expected.temporary == pytest.approx(measured.activations, rel=DYNAMIC)


def test_4bit_base_is_what_bitsandbytes_keeps() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(192, 512, bias=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu")
    with base_weight(layer):  # quantised by now, in the ordinary layout
        state = layer.weight.quant_state
        kept = [layer.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    shapes = Element(nn.Linear(192, 512, bias=False), Setting(0.1, 0, "cuda", True, torch.bfloat16, StorageTracker()))
    names = ("weight", "absmax", "quantisation")
    assert sum(shapes.get_buffer(name).nbytes for name in names) == sum(tensor.nbytes for tensor in kept)


def test_optimizer_temporary_of_the_gpu_path() -> None:
    """AdamW's foreach implementation, the default on a GPU, holds one more moment of all parameters."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (5000, 300, 40_000)]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.step()
    sizes = [parameter.numel() for parameter in parameters]
    expected = optimizer_temporary(sizes, "adamw", foreach=True)
    assert expected == pytest.approx(profiled_peak_bytes(profiled), abs=1024)
    states = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert optimizer_states(sizes, "adamw") == states


def test_8bit_states_by_hand() -> None:
    assert optimizer_states([4095, 4096, 4097], "adamw8bit") == 8 * 4095 + 2 * (4096 + 64) + 2 * (4097 + 68)


def test_the_tracker_counts_storages_once_and_sees_them_end() -> None:
    outside = torch.ones(100)
    with StorageTracker() as tracker:
        view = outside[:50]
        first = outside + 1  # 400 bytes
        alias = first.view(10, 10)
        with tracker.label(TEMPORARY):
            second = torch.empty(1000, dtype=torch.uint8)
        assert tracker.live == {"activations": 400, TEMPORARY: 1000}
        del second
        outside.mul_(2)
        assert tracker.live_bytes == 400
        del first
        assert tracker.live_bytes == 400  # the alias keeps it
        del alias, view
    assert tracker.live_bytes == 0 and tracker.peak_bytes == 1400 and tracker.largest[TEMPORARY] == 1000


def test_7b_account_by_hand() -> None:
    """Of one decoder layer by pencil: 4 projections of 4096^2, 3 of 4096 x 11008."""
    config = model_config("llava-1.5-7b")
    config.text_config.num_hidden_layers = 2
    found = account(config, "Dowser")
    weights = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    trained = 2 * (4 * round(0.1 * 4096**2) + 3 * round(0.1 * 4096 * 11008))
    assert found.trained_parameters == trained
    assert found.values == found.gradients == 4 * trained
    assert found.masks == weights // 8
    assert found.largest_temporary >= 2 * 4096 * 11008  # one layer's dense gradient, bfloat16
    # logits of 2048 tokens in float32, their log-softmax and its gradient; and little else
    logits = 2048 * 32064
    assert 12 * logits <= found.activations + found.temporary <= 14 * logits


def test_a_4bit_base_is_refused_where_it_cannot_train() -> None:
    with pytest.raises(ValueError, match="cannot train on a 4-bit base"):
        account(model_config("llava-1.5-7b"), "full fine-tuning", base="nf4")


def test_claims_of_the_committed_rows() -> None:
    by_default = {row["method"]: row for row in accounting.rows("account", **accounting.DEFAULTS)}
    dowser, masked = by_default["Dowser"], by_default["masked full fine-tuning"]
    assert dowser["total"] <= 32e9
    assert dowser["without_activations"] <= 0.40 * masked["without_activations"]
    assert dowser["total"] < min(by_default["SHiRA"]["total"], by_default["Super-Tuning"]["total"])
    (four_bit,) = accounting.rows("account", **{**accounting.DEFAULTS, "base": "nf4"}, method="Dowser")
    assert four_bit["total"] <= 24e9
    on_cpu = {row["method"]: row for row in accounting.rows("account", base="float32", device="cpu")}
    dense = on_cpu["masked full fine-tuning"]["without_activations"]
    assert on_cpu["Dowser"]["without_activations"] <= 0.40 * dense
    assert len(accounting.markdown().splitlines()) == 2 + len(by_default)


def test_committed_checks_agree() -> None:
    checks = accounting.rows("check")
    assert {row["method"] for row in checks} == set(ADAPT)
    for row in checks:
        expected, measured = row["accounted"], row["measured"]
        assert [expected[term] for term in STATIC] == [measured[term] for term in STATIC]
        peak = expected["activations"] + expected["temporary"]
        assert peak == pytest.approx(measured["activations"], rel=DYNAMIC)
