"""The questions: what the miniature model knows, and what it can be taught.

A task is a seeded generator of examples. ``UPSTREAM`` tasks are learned in pretraining and measure
what fine-tuning forgets; ``DOWNSTREAM`` tasks are what it is fine-tuned on. Train and test never
share an example:

- scanned digits: by image (every fifth scan is held out);
- facts (who lives where, eats what, is called what in Spanish): each fact is taught in all but one
  of its phrasings and tested in the one left out;
- word and number games: by a checksum of the question;
- drawn shapes: position, size, colour and noise are continuous, and the streams differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dowser_peft.miniature.drawing import GAUGES, draw, scanned_digit

Split = Literal["train", "test"]

SHAPES = list(GAUGES)
NEW_NAMES = ["dax", "wug", "zib", "fep", "lom", "tup", "kiv", "nog"]
PLACES = {
    "top left": (8, 8),
    "top right": (23, 8),
    "bottom left": (8, 23),
    "bottom right": (23, 23),
    "center": (15.5, 15.5),
}
COUNTS = ["one", "two", "three", "four", "five"]
DIGITS = [str(digit) for digit in range(10)]
SAME_IN_A_MIRROR = [0, 1, 8]  # a model that reads digits knows these already
LETTERS = list("bcdefghjklmnpqrstuvwxyz")

# name: home, food, Spanish name
ANIMALS = {
    "fox": ("forest", "mice", "zorro"),
    "bear": ("forest", "honey", "oso"),
    "deer": ("forest", "leaves", "ciervo"),
    "owl": ("forest", "mice", "buho"),
    "squirrel": ("forest", "nuts", "ardilla"),
    "whale": ("ocean", "krill", "ballena"),
    "shark": ("ocean", "fish", "tiburon"),
    "dolphin": ("ocean", "fish", "delfin"),
    "turtle": ("ocean", "algae", "tortuga"),
    "octopus": ("ocean", "crabs", "pulpo"),
    "camel": ("desert", "shrubs", "camello"),
    "snake": ("desert", "mice", "serpiente"),
    "lizard": ("desert", "insects", "lagarto"),
    "lion": ("savanna", "meat", "leon"),
    "zebra": ("savanna", "grass", "cebra"),
    "elephant": ("savanna", "leaves", "elefante"),
    "giraffe": ("savanna", "leaves", "jirafa"),
    "monkey": ("jungle", "fruit", "mono"),
    "parrot": ("jungle", "seeds", "loro"),
    "tiger": ("jungle", "meat", "tigre"),
    "cow": ("farm", "grass", "vaca"),
    "horse": ("farm", "grass", "caballo"),
    "hen": ("farm", "seeds", "gallina"),
    "pig": ("farm", "roots", "cerdo"),
    "frog": ("pond", "insects", "rana"),
    "duck": ("pond", "algae", "pato"),
    "bat": ("cave", "insects", "murcielago"),
    "wolf": ("mountain", "meat", "lobo"),
    "goat": ("mountain", "shrubs", "cabra"),
    "eagle": ("mountain", "fish", "aguila"),
}
PHRASINGS = {
    "lives": [
        "where does the {} live ?",
        "the home of the {} is the",
        "find a {} in the",
        "in which place lives a {} ?",
    ],
    "eats": [
        "what does the {} eat ?",
        "the food of the {} is",
        "feed a {} with",
        "which food likes a {} ?",
    ],
    "spanish": [
        "how do you say {} in spanish ?",
        "the spanish word for {} is",
        "translate {} :",
        "in spanish a {} is a",
    ],
}
# Words of the fixed questions and answers below that no table above contains.
FRAMES = (
    "what digit is this mirrored digit even or odd ? what shape size where is it small large",
    "how many shapes are there what is this called ? look ! a circle sits at",
    "copy : reverse : sort : after comes larger of and ?",
)
BULLET = "*"  # before each question where several share one text


@dataclass(frozen=True)
class Example:
    """One question, perhaps about an image ``[3, 32, 32]``, and its answer."""

    image: np.ndarray | None
    question: str
    answer: str


Task = Callable[[np.random.Generator, Split], Example]


def vocabulary() -> list[str]:
    """Every word that a task can use, in a fixed order."""
    facts = [word for name, row in ANIMALS.items() for word in (name, *row)]
    phrases = [phrase.replace("{}", "") for group in PHRASINGS.values() for phrase in group]
    listed = [BULLET, *DIGITS, *LETTERS, *SHAPES, *NEW_NAMES, *COUNTS, *facts]
    split_up = " ".join([*PLACES, *phrases, *FRAMES]).split()
    return list(dict.fromkeys([*listed, *split_up]))


# What the word games are played with. Every word, so that no embedding stays untrained.
_WORDS = [word for word in vocabulary() if word.isalnum()]


def _in_test(question: str) -> bool:
    return zlib.crc32(question.encode()) % 5 == 0


def _game(make: Callable[[np.random.Generator], tuple[str, str]]) -> Task:
    """A text task from ``make(rng) -> (question, answer)``, split by the question's checksum."""

    def sample(rng: np.random.Generator, split: Split) -> Example:
        while True:
            question, answer = make(rng)
            if _in_test(question) == (split == "test"):
                return Example(None, question, answer)

    return sample


def _fact(kind: str, column: int) -> Task:
    phrasings = PHRASINGS[kind]

    def sample(rng: np.random.Generator, split: Split) -> Example:
        index = int(rng.integers(len(ANIMALS)))
        held_out = index % len(phrasings)
        others = [position for position in range(len(phrasings)) if position != held_out]
        phrasing = phrasings[held_out if split == "test" else int(rng.choice(others))]
        name = list(ANIMALS)[index]
        return Example(None, phrasing.format(name), ANIMALS[name][column])

    return sample


def _pick(rng: np.random.Generator, options: list[str], count: int) -> list[str]:
    return [str(word) for word in rng.choice(options, count)]


def _copy(rng: np.random.Generator) -> tuple[str, str]:
    words = _pick(rng, _WORDS, int(rng.integers(2, 6)))
    return f"copy : {' '.join(words)} :", " ".join(words)


def _reverse(rng: np.random.Generator) -> tuple[str, str]:
    words = _pick(rng, _WORDS, int(rng.integers(2, 5)))
    return f"reverse : {' '.join(words)} :", " ".join(reversed(words))


def _sort(rng: np.random.Generator) -> tuple[str, str]:
    digits = _pick(rng, DIGITS, int(rng.integers(3, 5)))
    return f"sort : {' '.join(digits)} :", " ".join(sorted(digits))


def _successor(rng: np.random.Generator) -> tuple[str, str]:
    number = int(rng.integers(100, 999))
    return f"after {' '.join(str(number))} comes", " ".join(str(number + 1))


def _larger(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(np.arange(10, 100), 2, replace=False)
    larger = " ".join(str(max(first, second)))
    return f"larger of {' '.join(str(first))} and {' '.join(str(second))} ?", larger


def _one_shape(rng: np.random.Generator, radius: float) -> tuple[np.ndarray, str]:
    """A random shape of ``radius`` pixels, anywhere it fits, and its name."""
    name = str(rng.choice(SHAPES))
    x, y = rng.uniform(radius, 31.0 - radius, 2)
    return draw(rng, [(name, x, y, radius)]), name


def _shape_at_place(rng: np.random.Generator) -> tuple[np.ndarray, str, str]:
    """A shape at one of the five places: image, shape, place."""
    name, place = str(rng.choice(SHAPES)), str(rng.choice(list(PLACES)))
    x, y = np.asarray(PLACES[place]) + rng.uniform(-1.5, 1.5, 2)
    return draw(rng, [(name, x, y, rng.uniform(5.5, 7.5))]), name, place


def _shape(rng: np.random.Generator, split: Split) -> Example:
    image, name = _one_shape(rng, rng.uniform(6.0, 11.0))
    return Example(image, "what shape is this ?", name)


def _rename(rng: np.random.Generator, split: Split) -> Example:
    image, name = _one_shape(rng, rng.uniform(6.0, 11.0))
    return Example(image, "what is this called ?", NEW_NAMES[SHAPES.index(name)])


def _size(rng: np.random.Generator, split: Split) -> Example:
    size = str(rng.choice(["small", "large"]))
    image, _ = _one_shape(rng, rng.uniform(4.5, 6.0) if size == "small" else rng.uniform(9.0, 11.0))
    return Example(image, "what size is it ?", size)


def _place(rng: np.random.Generator, split: Split) -> Example:
    image, _, place = _shape_at_place(rng)
    return Example(image, "where is it ?", place)


def _style(rng: np.random.Generator, split: Split) -> Example:
    image, name, place = _shape_at_place(rng)
    return Example(image, "look !", f"a {name} sits at {place} !")


def _count(rng: np.random.Generator, split: Split) -> Example:
    count = int(rng.integers(1, len(COUNTS) + 1))
    cells = rng.choice(9, count, replace=False)
    jitter = rng.uniform(-1.0, 1.0, (count, 2))
    shapes = [
        (str(rng.choice(SHAPES)), 5.5 + 10 * (cell % 3) + dx, 5.5 + 10 * (cell // 3) + dy, 4.0)
        for cell, (dx, dy) in zip(cells, jitter, strict=True)
    ]
    return Example(draw(rng, shapes), "how many shapes are there ?", COUNTS[count - 1])


def _digit(rng: np.random.Generator, split: Split) -> Example:
    image, label = scanned_digit(rng, split)
    return Example(image, "what digit is this ?", str(label))


def _parity(rng: np.random.Generator, split: Split) -> Example:
    image, label = scanned_digit(rng, split)
    return Example(image, "even or odd ?", "odd" if label % 2 else "even")


def _mirror(rng: np.random.Generator, split: Split) -> Example:
    image, label = scanned_digit(rng, split)
    while label in SAME_IN_A_MIRROR:
        image, label = scanned_digit(rng, split)
    return Example(image[:, :, ::-1].copy(), "what mirrored digit is this ?", str(label))


UPSTREAM: dict[str, Task] = {
    "digit": _digit,
    "parity": _parity,
    "shape": _shape,
    "size": _size,
    "place": _place,
    "count": _count,
    "copy": _game(_copy),
    "reverse": _game(_reverse),
    "sort": _game(_sort),
    "successor": _game(_successor),
    "larger": _game(_larger),
    "lives": _fact("lives", 0),
    "eats": _fact("eats", 1),
    "spanish": _fact("spanish", 2),
}
DOWNSTREAM: dict[str, Task] = {"rename": _rename, "style": _style, "mirror": _mirror}
TASKS: dict[str, Task] = {**UPSTREAM, **DOWNSTREAM}


def examples(task: str, split: Split, count: int, seed: int) -> list[Example]:
    """``count`` examples of ``task``; the same arguments always give the same examples."""
    stream = [seed, zlib.crc32(task.encode()), int(split == "test")]
    rng = np.random.default_rng(stream)
    return [TASKS[task](rng, split) for _ in range(count)]
