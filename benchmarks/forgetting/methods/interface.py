"""The one interface of every method: from a base model and downstream data to a tuned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dowser_peft.miniature.training import Recipe
from dowser_peft.targets import default_targets, last_layers

Batch = dict[str, Any]  # keyword arguments of the model; with ``labels`` where it is trained on


@dataclass(frozen=True)
class Settings:
    """How to tune.

    Args:
        lr: the highest learning rate.
        steps: optimizer steps.
        seed: of the data order, the initial adapter, the probe and whatever else is drawn.
        rho: fraction of the weights that a sparse method changes.
        depth: fine-tune only the last so many decoder layers; None for all.
        recipe: schedule, accumulation, precision and devices.
    """

    lr: float
    steps: int
    seed: int = 0
    rho: float = 0.1
    depth: int | None = None
    recipe: Recipe = Recipe()

    @property
    def batches(self) -> int:
        """How many batches the training takes (of each process)."""
        return self.steps * self.recipe.accumulation


@dataclass(frozen=True)
class Data:
    """What a method may read.

    Args:
        name: of base model and downstream task together; keys ``cache``.
        tokenizer: of the base model.
        train: ``(count, seed)`` -> that many downstream batches (for each process its own).
        upstream: ``(count, seed)`` -> unanswered questions of the old tasks, in batches: for controls that
            cheat, and for the reference of the data-free score.
        cache: folder of the shared full fine-tuning runs; None to keep none.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    train: Callable[[int, int], Iterator[Batch]]
    upstream: Callable[[int, int], list[Batch]]
    cache: Path | None = None


Tune = Callable[[nn.Module, Data, Settings], nn.Module]


def target_modules(model: nn.Module, depth: int | None) -> list[str]:
    """The layers that every method trains: attention and MLP projections of the last ``depth`` decoder layers."""
    names = default_targets(model)
    return names if depth is None else last_layers(model, names, depth)
