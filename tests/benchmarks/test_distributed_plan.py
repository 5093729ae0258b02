"""The plan for many GPUs: its page is current, and its arithmetic is that of whole models."""

from __future__ import annotations

from itertools import product

import pytest

from benchmarks.distributed import plan
from benchmarks.speed.account import SHAPES

PAGE = plan.README.read_text(encoding="utf-8")


def test_the_page_is_current() -> None:
    """Of the long table one model: each takes as long to compute."""
    for line in [*plan.table(["34B"]).splitlines(), *plan.breakdown().splitlines(), *plan.traffic().splitlines()]:
        assert f"{line}\n" in PAGE
    for model, rho, granularity, base in product(plan.MODELS, plan.RHOS, plan.METHODS, plan.BASES):
        assert f"| {model}, {rho:g} | {granularity} | {base} |" in PAGE


@pytest.mark.parametrize(("granularity", "base"), [("element", "bf16"), ("column", "4-bit")])
def test_two_layers_tell_a_model_of_five(granularity: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = plan.MODELS["7B"]
    monkeypatch.setitem(SHAPES, name, SHAPES[name] | {"num_hidden_layers": 5})
    assert plan.whole("7B", granularity, base, 0.1) == plan.terms("7B", granularity, base, 0.1, 5)


def test_sharding() -> None:
    """Masks stay whole on every GPU, all else that stands still is divided."""
    whole = plan.whole("7B", "element", "bf16", 0.1)
    one, eight = (plan.sharded("7B", "element", "bf16", 0.1, gpus) for gpus in (1, 8))
    assert one.sharded == whole.base + whole.trained
    assert eight.sharded == one.sharded // 8
    assert one.replicated == eight.replicated == whole.selection >= 6_476_005_376 // 8  # of the target layers
    assert one.gathered == eight.gathered
    assert whole.trained == pytest.approx(16 * whole.values / 4, rel=1e-6)  # AdamW: 16 bytes a value
