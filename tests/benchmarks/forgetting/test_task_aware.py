"""Masks that look at the new task, against gradients by ``backward`` and choices by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.forgetting.methods import METHODS, Data, Settings, task_aware
from benchmarks.forgetting.methods.adapters import own_prompts
from benchmarks.forgetting.methods.task_aware import TASK_AWARE
from tests.models import tiny_llama

NAMES = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
SETTINGS = Settings(lr=1e-3, steps=1, seed=0, rho=0.25)


def _batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(3, 60, (2, 6), generator=generator)
        yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


DATA = Data("tiny/task", None, _batches, None)


@pytest.fixture
def model():
    return tiny_llama(vocab_size=64).requires_grad_(False)


def _gradient(model, name):
    """Of the mean loss of the same batches, by ``backward``."""
    weight = model.get_submodule(name).weight.requires_grad_()
    torch.stack([model(**batch).loss for batch in _batches(task_aware.BATCHES, 0)]).mean().backward()
    found = weight.grad.abs()
    weight.grad = None
    weight.requires_grad_(False)
    return found


def test_gradients_are_those_of_the_mean_loss_and_leave_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = task_aware.task_gradients(model, NAMES, DATA, 0)
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name in NAMES:
        torch.testing.assert_close(found[name], _gradient(model, name), rtol=1e-4, atol=1e-9)


def test_each_mask_is_the_brute_force_choice(model, monkeypatch):
    statistics = own_prompts(model, NAMES, DATA, 0)
    monkeypatch.setattr(task_aware, "own_prompts", lambda *_: statistics)
    monkeypatch.setattr(task_aware, "paper", lambda m, names, *_: _scores(m, statistics, names))
    masks = {name: TASK_AWARE[name].masks(model, NAMES, DATA, SETTINGS) for name in TASK_AWARE}
    for module in NAMES:
        gradient = task_aware.task_gradients(model, NAMES, DATA, 0)[module]
        weight = model.get_submodule(module).weight.abs()
        sensitivity = statistics.sensitivity(module).T @ statistics.activation(module)
        expected = {
            "task-ratio": weight * sensitivity / gradient,
            "task-sensitivity": sensitivity / gradient,
            "task-gradient": 1 / gradient,
        }
        for name, score in expected.items():
            chosen = set(score.flatten().argsort()[: score.numel() // 4].tolist())
            assert set(masks[name][module].flatten().nonzero().flatten().tolist()) == chosen, name
        assert len({tuple(masks[name][module].flatten().tolist()) for name in TASK_AWARE}) == 3


def _scores(model, statistics, names):
    return {
        name: model.get_submodule(name).weight.abs() * (statistics.sensitivity(name).T @ statistics.activation(name))
        for name in names
    }


def test_a_weight_without_gradient_comes_last():
    gradients = {"m": torch.tensor([[0.0, 1.0]])}
    found = task_aware._over_gradient({"m": torch.tensor([[1e-3, 1e3]])}, gradients)["m"]
    assert found.argmin() == 1 and found.isfinite().all()


def test_they_are_methods():
    assert {name for name in METHODS if name.startswith("task-")} == set(TASK_AWARE)
