"""What is kept of a run until its row is written: the tuned weights, and the answers of every finished task.

A run of a large model takes many hours, most of them training: one that is killed while it is tested goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


@dataclass(frozen=True)
class Training:
    """What a row tells about the training."""

    steps: int
    trained_parameters: int


@dataclass(frozen=True)
class Kept:
    """The folder of one run. Files appear complete or not at all.

    Args:
        folder: of this run alone.
    """

    folder: Path

    @property
    def _weights(self) -> Path:
        return self.folder / "weights.safetensors"

    def has_weights(self) -> bool:
        return self._weights.exists()

    def save_weights(self, model: nn.Module, names: Sequence[str], training: Training) -> None:
        """Keep the weights of the layers ``names``: those that methods change."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = {name: model.get_submodule(name).weight.detach().cpu().contiguous() for name in names}
        unfinished = self._weights.with_suffix(".partial")
        save_file(weights, unfinished, metadata={name: str(value) for name, value in vars(training).items()})
        unfinished.replace(self._weights)

    @torch.no_grad()
    def restore_weights(self, model: nn.Module) -> Training:
        """Put them into ``model``."""
        with safe_open(self._weights, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                model.get_submodule(name).weight.copy_(file.get_tensor(name))
            return Training(**{name: int(value) for name, value in file.metadata().items()})

    def answers(self, task: str) -> list[str] | None:
        """What was answered in a task, if it was finished."""
        path = self.folder / f"{task}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def save_answers(self, task: str, answers: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{task}.partial"
        unfinished.write_text(json.dumps(answers))
        unfinished.replace(self.folder / f"{task}.json")

    def forget(self) -> None:
        """Remove everything."""
        for path in self.folder.glob("*"):
            path.unlink()
        if self.folder.exists():
            self.folder.rmdir()
