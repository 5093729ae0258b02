"""The readable reference of the selection, in plain torch, for CPU and GPU.

Scores are never negative, so their float32 bit patterns sort like integers. Three passes over row blocks
find the exact k-th smallest without storing the scores, whatever their distribution:

    1. histogram of the upper 16 bits: which bucket holds the k-th smallest;
    2. histogram of the lower 16 bits inside that bucket: the exact threshold, and how many scores
       equal to it may still enter;
    3. emit the bits: every score below the threshold, and the first ties in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch

from dowser_peft import bitmask
from dowser_peft.scoring.blocks import RowBlocks, score_blocks

_BUCKETS = 1 << 16


@torch.no_grad()
def bottom_k_mask(
    weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor, k: int
) -> torch.Tensor:
    """Packed mask of exactly ``k`` lowest scores of ``|weight| * (sensitivity^T @ activation)``.

    The factors are float32 on the device of ``weight``; raises as :func:`dowser_peft.scoring.bottom_rho_mask`.
    """

    def bit_patterns() -> Iterator[torch.Tensor]:
        return (score.view(torch.int32) for _, score in score_blocks(weight, activation, sensitivity))

    bucket, below = _locate((bits >> 16 for bits in bit_patterns()), k)
    inside_bucket = (bits[bits >> 16 == bucket] & 0xFFFF for bits in bit_patterns())
    low_bits, below_in_bucket = _locate(inside_bucket, k - below)
    threshold = (bucket << 16) | low_bits
    ties_left = k - below - below_in_bucket

    packed = []
    for bits in bit_patterns():
        selected = bits < threshold
        ties = (bits == threshold).nonzero().view(-1)[:ties_left]
        selected[ties] = True
        ties_left -= ties.numel()
        packed.append(bitmask.pack(selected))
    return torch.cat(packed)


def _locate(blocks: Iterator[torch.Tensor], k: int) -> tuple[int, int]:
    """Of 16-bit numbers: the k-th smallest (k from 1), and how many are smaller than it."""
    histogram = reduce(torch.add, (torch.bincount(block, minlength=_BUCKETS) for block in blocks))
    cumulative = histogram.cumsum(0)
    number = int(torch.searchsorted(cumulative, k))
    return number, int(cumulative[number - 1]) if number else 0
