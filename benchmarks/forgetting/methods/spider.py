"""SPIDER (arXiv 2411.10928): let only those weights move that matter more to the new task than to the old ones.

Importance for what was learned is the pretrained magnitude, importance for the new task the gradient summed over
all steps so far. Both are ranked within their weight matrix by the same soft rank,

    rank(x) = sigmoid((|x| - mean |x|) / std |x|),        I = rank(W*),        G = rank(sum of gradients),

and after every optimizer step each weight is drawn back to its pretrained value W*,

    W <- (1 - c) W* + c W,        c = min(1, (G / (I + G)) / mean over the selected)  where G > I, and 0 elsewhere.

There is no rho: about half of the weights are selected at any time. The mean is over the selected weights of the
matrix; a matrix whose gradients are all zero selects none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.forgetting.methods.full import in_float32, train_targets
from benchmarks.forgetting.methods.interface import Data, Settings
from dowser_peft.miniature.training import train


def soft_rank(values: Tensor) -> Tensor:
    """In (0, 1) by magnitude within the tensor; zero everywhere for a tensor of zeros."""
    magnitudes = values.abs()
    if not magnitudes.any():
        return torch.zeros_like(magnitudes)
    return torch.sigmoid((magnitudes - magnitudes.mean()) / magnitudes.std())


def allocation(pretrained_rank: Tensor, gradient_rank: Tensor) -> Tensor:
    """How much of its update each weight keeps, c in [0, 1]."""
    share = torch.where(pretrained_rank < gradient_rank, gradient_rank / (pretrained_rank + gradient_rank), 0.0)
    selected = share[share > 0]
    return (share / selected.mean()).clamp(max=1.0) if selected.numel() else share


def spider(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
    """Full fine-tuning of the target layers under SPIDER's allocation; ``settings.rho`` plays no part."""
    names = train_targets(model, settings.depth)
    with in_float32(model, names):
        weights = [model.get_submodule(name).weight for name in names]
        pretrained = [weight.detach().clone() for weight in weights]
        ranks = [soft_rank(weight) for weight in pretrained]
        gradients = [torch.zeros_like(weight) for weight in pretrained]

        @torch.no_grad()
        def draw_back() -> None:
            for weight, origin, rank, gradient in zip(weights, pretrained, ranks, gradients, strict=True):
                gradient += weight.grad
                weight.copy_(torch.lerp(origin, weight, allocation(rank, soft_rank(gradient))))

        batches, recipe = data.train(settings.batches, settings.seed), settings.recipe
        train(model, batches, steps=settings.steps, lr=settings.lr, recipe=recipe, after_step=draw_back)
    return model
