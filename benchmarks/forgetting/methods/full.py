"""Full fine-tuning, and the delta it leaves: one run that all post-merge methods share.

Weights that are stored in less than float32 train as float32; the delta is what that changes, before anything is
rounded back, and lies on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.forgetting.methods.interface import Data, Settings, Tune, target_modules
from dowser_peft.miniature.training import Recipe, train

Delta = dict[str, Tensor]  # module name -> change of its weight, float32 [out, in]


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
        weight = model.get_submodule(name).weight
        weight += change.to(weight.device)


@contextmanager
def in_float32(model: nn.Module, names: list[str]) -> Iterator[None]:
    """The weights of these layers as float32; afterwards of the type that they were."""
    weights = [model.get_submodule(name).weight for name in names]
    types = [weight.dtype for weight in weights]
    for weight in weights:
        weight.data = weight.data.float()
    try:
        yield
    finally:
        for weight, dtype in zip(weights, types, strict=True):
            weight.grad = None
            weight.data = weight.data.to(dtype)


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
    if settings.recipe != Recipe():
        key += f"|{settings.recipe}"
    path = data.cache / "full" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if settings.recipe.accelerate and PartialState().num_processes > 1:
        _make_together(path, model, data, settings)
    else:
        with FileLock(f"{path}.lock"):
            if not path.exists():
                _save(_train(model, data, settings), path)
    return load_file(path)


def _make_together(path: Path, model: nn.Module, data: Data, settings: Settings) -> None:
    """As processes that train one model: none may wait for a lock while the others train."""
    state = PartialState()
    state.wait_for_everyone()
    is_there = path.exists()
    state.wait_for_everyone()  # before any of them writes it
    if not is_there:
        delta = _train(model, data, settings)
        if state.is_main_process:
            _save(delta, path)
    state.wait_for_everyone()


def _save(delta: Delta, path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(delta, partial)
    partial.replace(path)


def _weights_id(model: nn.Module) -> str:
    """Tells checkpoints apart: a cached run belongs to the exact weights that it started from."""
    total = sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())
    return f"{total:.12e}"


def _train(model: nn.Module, data: Data, settings: Settings) -> Delta:
    names = train_targets(model, settings.depth)
    before = {name: model.get_submodule(name).weight.detach().cpu().clone() for name in names}
    try:
        with in_float32(model, names):
            batches = data.train(settings.batches, settings.seed)
            train(model, batches, steps=settings.steps, lr=settings.lr, recipe=settings.recipe)
            weights = {name: model.get_submodule(name).weight.detach().cpu() for name in names}
            return {name: weight - before[name].float() for name, weight in weights.items()}
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
