"""Examples: an image, a question with its instructions, the accepted answers; and their order in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from benchmarks.forgetting.real.readers import Item
from benchmarks.forgetting.real.sources import DataError


@dataclass(frozen=True)
class Example:
    """A question about an image.

    Args:
        image: in RGB.
        question: with its instructions, without chat template.
        references: accepted answers; the first one is learned.
    """

    image: Image.Image
    question: str
    references: list[str]


class Examples(Sequence[Example]):
    """The examples of a task, whose images are read when they are asked for."""

    def __init__(self, rows: Dataset, items: list[Item], column: str = "image", root: Path | None = None) -> None:
        self.items, self._column, self._root = items, column, root
        self._images = rows.select_columns([column])  # so that no other image of a row is decoded

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        row, question, references = self.items[index]
        image = self._images[row][self._column]
        if isinstance(image, str):
            image = Image.open(find_image(self._root or Path(), image))
        return Example(image.convert("RGB"), question, references)

    def subset(self, count: int | None) -> Examples:
        """``count`` of them, drawn once and for all: the same for every method and seed."""
        if count is None or count >= len(self):
            return self
        chosen = np.random.default_rng(0).permutation(len(self))[:count]
        return Examples(self._images, [self.items[index] for index in chosen], self._column, self._root)


def find_image(root: Path, image: str) -> Path:
    """An image of LLaVA's annotations.

    Raises:
        DataError: if it is not there.
    """
    for path in (root / image, root / "images" / image, Path(image)):
        if path.is_file():
            return path
    raise DataError(
        f"no image {str(root / image)!r}: put the images, or links to their folders, beside the annotations"
    )


def micro_batches(
    items: int, batches: int, size: int, seed: int, *, process: int = 0, processes: int = 1
) -> Iterator[list[int]]:
    """``batches`` lists of ``size`` indices for one of several processes, epoch after epoch in a new order.

    However a global batch is cut into processes and accumulated batches, it consists of the same examples.
    """
    order: list[int] = []
    epoch = 0
    for _ in range(batches):
        while len(order) < size * processes:
            order += np.random.default_rng([seed, epoch]).permutation(items).tolist()
            epoch += 1
        yield order[size * process : size * (process + 1)]
        order = order[size * processes :]
