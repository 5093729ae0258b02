"""The training loop beyond the miniature's recipe."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from dowser_peft.miniature import training
from dowser_peft.miniature.training import NonFiniteLossError, Recipe, train
from tests.models import VOCABULARY, tiny_llama


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _batches(count, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, 6), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _joined(batches, size):
    found = list(batches)
    for start in range(0, len(found), size):
        part = found[start : start + size]
        yield {name: torch.cat([batch[name] for batch in part]) for name in part[0]}


def _trained(batches, **options):
    model = tiny_llama()
    losses = train(model, batches, lr=1e-2, **options)
    return model, losses


def _assert_same(first, second, **tolerance):
    for (name, value), wanted in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, msg=name, **tolerance)


def test_accumulated_batches_make_the_step_of_one_large_batch():
    small, losses = _trained(_batches(6), steps=2, recipe=Recipe(accumulation=3))
    large, expected = _trained(_joined(_batches(6), 3), steps=2)
    assert losses == pytest.approx(expected, rel=1e-5)
    _assert_same(small, large, rtol=1e-4, atol=1e-5)


def test_weight_decay_is_decoupled():
    """The first step at rate lr moves each weight as without decay, and by a factor of 1 - lr * decay before that."""
    before = tiny_llama()
    plain, _ = _trained(_batches(1), steps=1)
    decayed, _ = _trained(_batches(1), steps=1, recipe=Recipe(weight_decay=10.0))
    for start, without, found in zip(before.parameters(), plain.parameters(), decayed.parameters(), strict=True):
        torch.testing.assert_close(found, without - 1e-2 * 10.0 * start, rtol=1e-5, atol=1e-6)


def test_one_process_of_accelerate_trains_as_none():
    found, losses = _trained(_batches(4), steps=2, recipe=Recipe(accumulation=2, accelerate=True))
    expected, wanted = _trained(_batches(4), steps=2, recipe=Recipe(accumulation=2))
    assert losses == wanted
    _assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(), [1.0, 0.75, 0.5, 0.25]),
        (Recipe("linear", 0.5), [0.0, 0.5, 1.0, 0.5]),
        (Recipe("cosine", 0.5), [0.0, 0.5, 1.0, 0.5]),
        (Recipe("cosine"), [1.0, 0.8536, 0.5, 0.1464]),  # (1 + cos(pi step / 4)) / 2
        (Recipe("cosine", 0.3), [0.0, 0.5, 1.0, 0.5]),  # 1.2 steps of warm-up are two
    ],
)
def test_learning_rates(recipe, expected, monkeypatch):
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(training.torch.optim, "AdamW", Watched)
    _trained(_batches(4), steps=4, recipe=recipe)
    assert rates == pytest.approx([1e-2 * factor for factor in expected], rel=1e-3, abs=1e-12)


def test_bfloat16_is_autocast():
    model = tiny_llama()
    seen = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(model, _batches(1), steps=1, lr=1e-2, recipe=Recipe(bfloat16=True))
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_loss_that_is_no_number_in_any_part_of_a_step():
    def broken():
        yield from _batches(3)
        for batch in _batches(1):
            yield batch | {"labels": torch.full_like(batch["labels"], -100)}  # the mean of nothing

    with pytest.raises(NonFiniteLossError, match="the loss became nan at step 2 of 2 with lr=0.01"):
        _trained(broken(), steps=2, recipe=Recipe(accumulation=2))


def test_a_model_that_accelerate_would_split_is_refused(monkeypatch):
    class Split:
        def __init__(self, **options):
            self.distributed_type = type("Kind", (), {"value": "FSDP"})

    monkeypatch.setattr(training, "Accelerator", Split)
    with pytest.raises(ValueError, match="set up for FSDP.*accelerate launch --multi_gpu"):
        _trained(_batches(1), steps=1, recipe=Recipe(accelerate=True))
