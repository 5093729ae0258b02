"""Full fine-tuning, and the delta it leaves: one run that all post-merge methods share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.forgetting.methods.interface import Data, Settings, Tune, target_modules
from dowser_peft.miniature.training import train

Delta = dict[str, Tensor]  # module name -> change of its weight [out, in]


def train_targets(model: nn.Module, depth: int | None) -> list[str]:
    """Let the weights of the target layers train, and nothing else; returns the layers' names."""
    names = target_modules(model, depth)
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).weight.requires_grad_()
    return names


@torch.no_grad()
def add(model: nn.Module, delta: Delta) -> None:
    """Add ``delta`` to the weights of ``model`` in place."""
    for name, change in delta.items():
        model.get_submodule(name).weight += change


@contextmanager
def shifted(model: nn.Module, delta: Delta) -> Iterator[None]:
    """The model with ``delta`` added; afterwards its weights are what they were, bit for bit."""
    before = {name: model.get_submodule(name).weight.detach().clone() for name in delta}
    add(model, delta)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_submodule(name).weight.copy_(weight)


def full_delta(model: nn.Module, data: Data, settings: Settings) -> Delta:
    """What full fine-tuning changes in each target layer; ``model`` keeps its weights.

    Trained once for each data, rate, steps, seed and depth, and kept in ``data.cache``; a second process that
    wants the same run waits for the first.
    """
    if data.cache is None:
        return _train(model, data, settings)
    key = f"{data.name}|{settings.lr!r}|{settings.steps}|{settings.seed}|{settings.depth}|{_weights_id(model)}"
    path = data.cache / "full" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(_train(model, data, settings), partial)
            partial.replace(path)
    return load_file(path)


def _weights_id(model: nn.Module) -> str:
    """Tells checkpoints apart: a cached run belongs to the exact weights that it started from."""
    total = sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())
    return f"{total:.12e}"


def _train(model: nn.Module, data: Data, settings: Settings) -> Delta:
    names = train_targets(model, settings.depth)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    try:
        train(model, data.train(settings.steps, settings.seed), steps=settings.steps, lr=settings.lr)
        with torch.no_grad():
            return {name: model.get_submodule(name).weight - weight for name, weight in before.items()}
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_submodule(name).weight.copy_(weight)


def post_merge(patch: Callable[[Delta, nn.Module, Data, Settings], Delta]) -> Tune:
    """A method that fine-tunes in full and then keeps ``patch(delta, base model, data, settings)`` of the delta."""

    def tune(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
        delta = full_delta(model, data, settings)
        train_targets(model, settings.depth)
        add(model, patch(delta, model, data, settings))
        return model.eval()

    return tune


def all_of_it(delta: Delta, model: nn.Module, data: Data, settings: Settings) -> Delta:
    """Full fine-tuning itself."""
    return delta


full_fine_tuning = post_merge(all_of_it)
