"""From the rows of a data set to its questions: where the image is, what is asked, what counts as right.

Images are not read here: rows may be hundreds of thousands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.forgetting.real.sources import DataError, Split

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
CAPTIONS = (
    "Write a short description for the image.",
    "Describe the image as simply as possible with a sentence or phrase.",
    "Provide a short description of the image.",
    "Briefly describe the content of the image.",
    "Give a brief summary of what you see.",
)


Item = tuple[int, str, list[str]]  # row with the image, question, references


@dataclass(frozen=True)
class Context:
    """What reading needs beside the rows."""

    name: str
    split: Split


Read = Callable[[Dataset, Context], list[Item]]


def annotated(rows: Dataset, context: Context) -> list[Item]:
    """LLaVA's layouts: conversations to learn from, or a text with its answer or references."""
    found = []
    for index, row in enumerate(rows):
        if row.get("conversations"):
            human, machine = row["conversations"][:2]
            found.append((index, human["value"].replace("<image>", "").strip(), [machine["value"].strip()]))
            continue
        answer = row.get("reference", row.get("answer"))
        if "text" not in row or answer is None:
            raise DataError(
                f"{context.name}: row {index} of the annotations has neither 'conversations' nor 'text' with "
                "'reference' or 'answer'"
            )
        found.append((index, row["text"], [answer] if isinstance(answer, str) else list(answer)))
    return found


def captions(rows: Dataset, context: Context) -> list[Item]:
    """One caption a row (to learn from as they are, to test by image), or all captions of an image in a row."""
    column = "answer" if "answer" in rows.column_names else "caption"
    if column not in rows.column_names:
        raise DataError(f"{context.name}: no column 'caption' or 'answer', but {', '.join(rows.column_names)}")
    rng = np.random.default_rng(0)
    found: list[Item] = []
    by_image: dict[Any, Item] = {}
    images = rows["cocoid"] if "cocoid" in rows.column_names else range(len(rows))
    for index, (image, captions) in enumerate(zip(images, rows[column], strict=True)):
        texts = [captions] if isinstance(captions, str) else list(captions)
        if image in by_image and context.split == "test":
            by_image[image][2].extend(texts)
            continue
        if context.split == "train":
            texts = [texts[int(rng.integers(len(texts)))]]
        item = (index, CAPTIONS[int(rng.integers(len(CAPTIONS)))], texts)
        found.append(item)
        by_image.setdefault(image, item)
    return found


def questions(suffix: str, answer: str) -> Read:
    """A column ``question``, and one with an answer or several."""

    def read(rows: Dataset, context: Context) -> list[Item]:
        found = []
        for index, (question, answers) in enumerate(zip(rows["question"], rows[answer], strict=True)):
            found.append((index, question + suffix, [answers] if isinstance(answers, str) else list(answers)))
        return found

    return read


def text_vqa(rows: Dataset, context: Context) -> list[Item]:
    """With the tokens that an OCR system read, as LLaVA-1.5 is evaluated."""
    plain = questions("", "answers")(rows, context)
    return [
        (index, f"{question}\nReference OCR token: {', '.join(tokens)}{SHORT}", answers)
        for (index, question, answers), tokens in zip(plain, rows["ocr_tokens"], strict=True)
    ]


def ocr_vqa(rows: Dataset, context: Context) -> list[Item]:
    """Several questions about each image."""
    return [
        (index, question + SHORT, [answer])
        for index, (questions, answers) in enumerate(zip(rows["questions"], rows["answers"], strict=True))
        for question, answer in zip(questions, answers, strict=True)
    ]


def _is_empty(value: Any) -> bool:
    return value is None or str(value).strip().lower() in ("", "nan", "none")


def mm_bench(suffix: str) -> Read:
    def read(rows: Dataset, context: Context) -> list[Item]:
        letters = [letter for letter in "ABCDEFGH" if letter in rows.column_names]
        found = []
        for index, row in enumerate(rows.select_columns(["question", "hint", "answer", *letters])):
            hint = [] if _is_empty(row["hint"]) else [row["hint"]]
            options = [f"{letter}. {row[letter]}" for letter in letters if not _is_empty(row[letter])]
            found.append((index, "\n".join([*hint, row["question"], *options]) + suffix, [row["answer"]]))
        return found

    return read


def icon_qa(rows: Dataset, context: Context) -> list[Item]:
    """Questions with options in words; their answer may be given as text or as position."""
    kept = [index for index, kind in enumerate(rows["ques_type"]) if kind == "choose_txt"]
    part = rows.select(kept).select_columns(["question", "choices", "answer"])
    choices = [[choice.strip() for choice in row["choices"].split(",")] for row in part]
    answers = [str(answer).strip() for answer in part["answer"]]
    pairs = list(zip(choices, answers, strict=True))
    if all(answer in options for options, answer in pairs):
        right = [options.index(answer) for options, answer in pairs]
    elif all(re.fullmatch(r"\d+", answer) and int(answer) < len(options) for options, answer in pairs):
        right = [int(answer) for answer in answers]
    else:
        raise DataError(f"{context.name}: answers are neither among their choices nor positions in them")
    found = []
    for index, question, options, place in zip(kept, part["question"], choices, right, strict=True):
        lines = [f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(options)]
        found.append((index, "\n".join([question, *lines]) + LETTER, [chr(ord("A") + place)]))
    return found


def image_net(rows: Dataset, context: Context) -> list[Item]:
    question = "What is the object in the image?" + SHORT
    names = (name.replace("_", " ").capitalize() for name in rows["class_name"])
    return [(index, question, [name]) for index, name in enumerate(names)]
