"""Masks that also look at the new task: weights that matter little to the old ones and much to the new one.

With g = d(loss)/dW on the first batches of the new task, at the base model:

    task-ratio         the lowest S_ij / |g_ij|
    task-sensitivity   the lowest ||J_i|| |h_j| / |g_ij|: AdamW moves every weight about as far, whatever its size, and
                       what that does to old outputs has no |W| in it
    task-gradient      the largest |g_ij|, a control that ignores the old tasks

None is data-free any more, but none needs more than the data that fine-tuning has anyway.
"""

from __future__ import annotations

import torch
from accelerate.utils import send_to_device
from torch import nn

from benchmarks.forgetting.methods import adapters
from benchmarks.forgetting.methods.adapters import own_prompts
from benchmarks.forgetting.methods.interface import Data
from benchmarks.forgetting.methods.variants import Scores, Variant, paper

BATCHES = 8


def task_gradients(model: nn.Module, names: list[str], data: Data, seed: int) -> Scores:
    """|mean gradient| of the new task's loss over ``BATCHES`` training batches, ``[out, in]`` of each module."""
    model.eval()
    weights = [model.get_submodule(name).weight for name in names]
    wanted = [weight.requires_grad for weight in weights]
    sums = [torch.zeros_like(weight) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in data.train(BATCHES, seed):
            loss = model(**send_to_device(batch, weights[0].device)).loss
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                total += gradient
    finally:
        for weight, was in zip(weights, wanted, strict=True):
            weight.requires_grad_(was)
    return {name: total.abs() / BATCHES for name, total in zip(names, sums, strict=True)}


def _over_gradient(importance: Scores, gradients: Scores) -> Scores:
    """Weights without gradient come last."""
    tiny = torch.finfo(torch.float32).tiny
    return {name: score / gradients[name].clamp_min(tiny) for name, score in importance.items()}


def ratio(model: nn.Module, names: list[str], data: Data, seed: int) -> Scores:
    return _over_gradient(paper(model, names, data, seed), task_gradients(model, names, data, seed))


def sensitivity_ratio(model: nn.Module, names: list[str], data: Data, seed: int) -> Scores:
    importance = adapters.scores(model, own_prompts(model, names, data, seed), names, weight=False)
    return _over_gradient(importance, task_gradients(model, names, data, seed))


def largest_gradient(model: nn.Module, names: list[str], data: Data, seed: int) -> Scores:
    return {name: -gradient for name, gradient in task_gradients(model, names, data, seed).items()}


TASK_AWARE = {
    "task-ratio": Variant("S over the task's gradient", ratio),
    "task-sensitivity": Variant("J h over the task's gradient", sensitivity_ratio),
    "task-gradient": Variant("Largest gradient of the task", largest_gradient),
}
