"""Every task by name: its data set, its prompts, its metric.

Prompts are those of LLaVA-1.5's evaluation and, for captions, ImageNet-R and IconQA, of the annotations that the
authors of Model-Dowser publish; so are the numbers of examples (10,000 to learn from).

Differences to the paper, where the hub's data differ: Flickr30k and ImageNet-R have a single split on the hub, which
is cut here, always at the same place; IconQA has no training split there, so that its validation split takes its
place. With the authors' annotations in a folder (``--data NAME=FOLDER``) prompts, splits and examples are theirs.
MMBench is the plain accuracy on the public dev split, without the rotation of options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from benchmarks.forgetting.real import readers
from benchmarks.forgetting.real.examples import Examples, find_image
from benchmarks.forgetting.real.metrics import METRICS
from benchmarks.forgetting.real.readers import Context, Item, Read
from benchmarks.forgetting.real.sources import DataError, Source, Split, is_annotated, load

TRAIN_ITEMS = 10_000


@dataclass(frozen=True)
class Task:
    """A task of the benchmark.

    Args:
        label: as in tables.
        metric: a key of ``METRICS``.
        source: its data set.
        columns: that reading needs.
        read: from rows to examples without their images.
        new_tokens: the longest answer.
        held_out: of a data set with one split, how many rows make the test.
        image: column of the image.
        images: configuration with the images, joined by ``imageId`` and ``id``, if they are not in the rows.
    """

    label: str
    metric: str
    source: Source
    columns: list[str]
    read: Read
    new_tokens: int = 16
    held_out: int = 0
    image: str = "image"
    images: str | None = None

    @property
    def learns(self) -> bool:
        """Whether it can be a downstream task."""
        return bool(self.source.train)

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        return METRICS[self.metric](predictions, references)


def examples(name: str, split: Split, folder: Path | None = None) -> Examples:
    """The examples of a task.

    Raises:
        DataError: if its data set is not there, or not as expected.
    """
    task = TASKS[name]
    context = Context(name, split)
    if folder is not None and is_annotated(folder):
        rows = load(name, task.source, split, folder, ["image"])
        found = Examples(rows, readers.annotated(rows, context), root=folder)
        if found.items:
            find_image(folder, rows[0]["image"])  # fails now rather than after the training
    else:
        rows = load(name, task.source, split, folder, task.columns)
        if task.held_out:
            rows = _part(rows, split, task.held_out)
        items = task.read(rows, context)
        if task.images is not None:
            rows, items = _with_images(name, task, split, folder, rows, items)
        found = Examples(rows, items, task.image)
    if not found.items:
        raise DataError(f"{name}: the {split} split has no usable rows")
    return found


def _part(rows: Dataset, split: Split, held_out: int) -> Dataset:
    """Training or test part of a data set with one split: by its column ``split`` if it has one, else by chance."""
    if "split" in rows.column_names:
        chosen = [index for index, value in enumerate(rows["split"]) if value == split]
    else:
        order = np.random.default_rng(0).permutation(len(rows))
        chosen = sorted(order[:held_out] if split == "test" else order[held_out:])
    return rows.select(chosen)


def _with_images(
    name: str, task: Task, split: Split, folder: Path | None, rows: Dataset, items: list[Item]
) -> tuple[Dataset, list[Item]]:
    """Rows of images, and the items with the places of their images there."""
    source = Source(task.source.path, task.source.test, task.source.train, task.images)
    images = load(name, source, split, folder, ["id", task.image])
    place = {identity: row for row, identity in enumerate(images["id"])}
    wanted = list(rows["imageId"])
    return images, [(place[wanted[row]], question, references) for row, question, references in items]


_MMBENCH = ["image", "question", "hint", "answer", "A", "B"]
TASKS: dict[str, Task] = {
    "coco-caption": Task(
        "COCO-Caption",
        "CIDEr",
        Source("jxie/coco_captions", "test", "train"),
        ["image"],
        readers.captions,
        64,
    ),
    "flickr30k": Task(
        "Flickr30k",
        "CIDEr",
        Source("lmms-lab/flickr30k", "test", "test"),
        ["image"],
        readers.captions,
        64,
        held_out=1000,
    ),
    "iconqa": Task(
        "IconQA",
        "option",
        Source("lmms-lab/ICON-QA", "test", "val"),
        ["query_image", "question", "choices", "answer", "ques_type"],
        readers.icon_qa,
        image="query_image",
    ),
    "imagenet-r": Task(
        "ImageNet-R",
        "exact match",
        Source("axiong/imagenet-r", "test", "test"),
        ["image", "class_name"],
        readers.image_net,
        held_out=3000,
    ),
    "textvqa": Task(
        "TextVQA",
        "VQA accuracy",
        Source("lmms-lab/textvqa", "validation"),
        ["image", "question", "answers", "ocr_tokens"],
        readers.text_vqa,
    ),
    "mmbench-en": Task(
        "MMBench", "option", Source("lmms-lab/MMBench", "dev", config="en"), _MMBENCH, readers.mm_bench(readers.LETTER)
    ),
    "mmbench-cn": Task(
        "MMBench-CN",
        "option",
        Source("lmms-lab/MMBench", "dev", config="cn"),
        _MMBENCH,
        readers.mm_bench(readers.LETTER_CN),
    ),
    "gqa": Task(
        "GQA",
        "exact match",
        Source("lmms-lab/GQA", "testdev", config="testdev_balanced_instructions"),
        ["imageId", "question", "answer"],
        readers.questions(readers.SHORT, "answer"),
        images="testdev_balanced_images",
    ),
    "ocrvqa": Task(
        "OCRVQA",
        "exact match",
        Source("howard-hou/OCR-VQA", "test"),
        ["image", "questions", "answers"],
        readers.ocr_vqa,
    ),
    "okvqa": Task(
        "OKVQA",
        "VQA accuracy",
        Source("lmms-lab/OK-VQA", "val2014"),
        ["image", "question", "answers"],
        readers.questions(readers.SHORT, "answers"),
    ),
}
DOWNSTREAM = [name for name, task in TASKS.items() if task.learns]
UPSTREAM = [name for name, task in TASKS.items() if not task.learns]
