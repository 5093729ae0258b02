"""Images for the miniature tasks: drawn shapes, and real handwritten digits.

Every image is a float32 array ``[3, 32, 32]`` in [-1, 1]. Shapes are drawn from gauge functions: a
gauge is 1 on the outline, below 1 inside and above 1 outside, so one formula turns all of them
into anti-aliased masks. The digits are the 1,797 scanned 8x8 digits that come with scikit-learn,
resampled to 32x32; every fifth one is held out for testing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

IMAGE_SIZE = 32
TEST_EVERY = 5

_ROWS, _COLUMNS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slanted = 0.866 * np.abs(x) - 0.5 * y
    return 2.0 * np.maximum(slanted, y)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    upright = np.maximum(3.0 * np.abs(x), np.abs(y))
    level = np.maximum(np.abs(x), 3.0 * np.abs(y))
    return np.minimum(upright, level)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = np.hypot(x, y)
    return np.maximum(radius, 1.55 - radius)


# x runs right and y runs down, in units of the shape's radius.
GAUGES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y),
    "square": lambda x, y: 1.2 * np.maximum(np.abs(x), np.abs(y)),
    "diamond": lambda x, y: np.abs(x) + np.abs(y),
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "bar": lambda x, y: np.maximum(np.abs(x), 3.5 * np.abs(y)),
    "star": lambda x, y: (np.sqrt(np.abs(x)) + np.sqrt(np.abs(y))) ** 2 / 1.3,
}


def draw(rng: np.random.Generator, shapes: list[tuple[str, float, float, float]]) -> np.ndarray:
    """Draw ``(name, centre_x, centre_y, radius)`` shapes, in pixels, in random bright colours.

    Returns:
        Image ``[3, 32, 32]`` on a dark, slightly noisy background.
    """
    image: np.ndarray = rng.normal(-0.8, 0.05, (3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.float32)
    for name, centre_x, centre_y, radius in shapes:
        gauge = GAUGES[name]((_COLUMNS - centre_x) / radius, (_ROWS - centre_y) / radius)
        mask = np.clip((1.0 - gauge) * radius + 0.5, 0.0, 1.0)
        colour = rng.uniform(0.2, 1.0, (3, 1, 1)).astype(np.float32)
        image = image * (1.0 - mask) + colour * mask
    return image.clip(-1.0, 1.0).astype(np.float32)


@functools.cache
def _scanned_digits() -> tuple[np.ndarray, np.ndarray]:
    """All scans ``[1797, 8, 8]`` in [0, 1] and their labels ``[1797]``."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target


def digit_indices(split: str) -> np.ndarray:
    """Positions of the scans that belong to ``split`` ("train" or "test")."""
    positions = np.arange(len(_scanned_digits()[1]))
    held_out = positions % TEST_EVERY == 0
    return positions[held_out if split == "test" else ~held_out]


def _resample(scan: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear values of ``scan`` ``[8, 8]`` at ``x``, ``y`` ``[32, 32]``; zero outside."""
    padded = np.pad(scan, 2)
    x = np.clip(x + 2.0, 0.0, 10.999)
    y = np.clip(y + 2.0, 0.0, 10.999)
    left, top = x.astype(int), y.astype(int)
    right_share, lower_share = x - left, y - top
    upper = padded[top, left] * (1 - right_share) + padded[top, left + 1] * right_share
    lower = padded[top + 1, left] * (1 - right_share) + padded[top + 1, left + 1] * right_share
    return upper * (1 - lower_share) + lower * lower_share


def scanned_digit(rng: np.random.Generator, split: str) -> tuple[np.ndarray, int]:
    """A random scan of ``split`` and its label.

    Training scans are also shifted, turned, slanted and scaled a little: 1,437 of them are few
    enough to memorise. Test scans are shown as they are.
    """
    scans, labels = _scanned_digits()
    index = int(rng.choice(digit_indices(split)))
    x = (_COLUMNS - 15.5) / 4.0
    y = (_ROWS - 15.5) / 4.0
    if split == "train":
        angle, slant = rng.uniform(-0.2, 0.2, 2)
        zoom_x, zoom_y = rng.uniform(0.88, 1.12, 2)
        turned_x = np.cos(angle) * x + (np.sin(angle) + slant) * y
        turned_y = -np.sin(angle) * x + np.cos(angle) * y
        x = turned_x * zoom_x + rng.uniform(-0.7, 0.7)
        y = turned_y * zoom_y + rng.uniform(-0.7, 0.7)
    grey = 2.0 * _resample(scans[index], x + 3.5, y + 3.5) - 1.0
    image = np.broadcast_to(grey, (3, IMAGE_SIZE, IMAGE_SIZE))
    return image.astype(np.float32), int(labels[index])
