"""Where the k-th smallest score lies, guessed from a small sample.

If k of ``numel`` scores are below the threshold, the number below it in a sample of m is about binomial, with
mean ``m p`` and standard deviation ``sqrt(m p (1 - p))``, ``p = k / numel``. So the sample's order statistics
``_DEVIATIONS`` deviations below and above ``m p`` enclose the threshold in all but one of a million layers. That
is only a guess: who uses it counts, and falls back on a full search where it fails.
"""

from __future__ import annotations

import math

import torch

_DEVIATIONS = 5.0
_SAMPLE = 1 << 15
_HASH = 2654435761  # Knuth's multiplicative hash: a fixed sample, so the same run twice


def sample_positions(numel: int, size: int, device: torch.device) -> torch.Tensor:
    """Ascending flat indices ``[size]`` (int64): one at a pseudo-random place in each of ``size`` equal strata."""
    stratum = numel // size
    number = torch.arange(size, device=device)
    return number * stratum + (number * _HASH % (1 << 32)) % stratum


def enclosing_ranks(k: int, numel: int, size: int) -> tuple[int, int]:
    """Ranks (from 0) in the sorted sample that enclose the k-th smallest of all.

    The lower may be negative and the upper may be ``size`` or more: then the sample bounds that side by nothing.
    """
    fraction = k / numel
    margin = _DEVIATIONS * math.sqrt(size * fraction * (1 - fraction)) + 2
    return math.floor(size * fraction - margin), math.ceil(size * fraction + margin)


def sample_size(k: int, numel: int, most_inside: int) -> int:
    """How many scores to sample so that about three quarters of ``most_inside`` scores lie between the ranks.

    At least ``_SAMPLE``, so that the interval is narrow at little cost, but at most one weight in 64: a larger
    sample costs more than it saves, and the interval of a very large layer then holds more than ``most_inside``.
    """
    fraction = k / numel
    width = 2 * _DEVIATIONS * math.sqrt(fraction * (1 - fraction))
    wanted = math.ceil((width * numel / (0.75 * most_inside)) ** 2)
    return min(max(_SAMPLE, wanted), numel // 64)
