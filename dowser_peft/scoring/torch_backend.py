"""The readable reference of the selection, in plain torch, for CPU and GPU.

Scores are never negative, so their float32 bit patterns sort like integers. Three passes over row blocks
find the exact k-th smallest without storing the scores:

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

_BLOCK_ELEMENTS = 1 << 21  # 8 MB of float32 scores at a time
_BUCKETS = 1 << 16


@torch.no_grad()
def bottom_k_mask(weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, k: int) -> torch.Tensor:
    """Packed mask of exactly ``k`` lowest scores of ``|weight| * (sensitivity^T @ activation)``."""
    activation = activation.to(weight.device, torch.float32)
    sensitivity = sensitivity.to(weight.device, torch.float32)

    def score_blocks() -> Iterator[torch.Tensor]:
        return _score_bits(weight, activation, sensitivity)

    bucket, below = _locate((bits >> 16 for bits in score_blocks()), k)
    inside_bucket = (bits[bits >> 16 == bucket] & 0xFFFF for bits in score_blocks())
    low_bits, below_in_bucket = _locate(inside_bucket, k - below)
    threshold = (bucket << 16) | low_bits
    ties_left = k - below - below_in_bucket

    packed = []
    for bits in score_blocks():
        selected = bits < threshold
        ties = (bits == threshold).nonzero().view(-1)[:ties_left]
        selected[ties] = True
        ties_left -= ties.numel()
        packed.append(bitmask.pack(selected))
    return torch.cat(packed)


def _score_bits(weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor) -> Iterator[torch.Tensor]:
    """Float32 bit patterns of the scores, as int32, one row block at a time: ``[rows * in]``."""
    out_features, in_features = weight.shape
    rows = max(8, _BLOCK_ELEMENTS // max(1, in_features) // 8 * 8)  # of 8: a block fills whole mask bytes
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        score = sensitivity[:, start:stop].T @ activation  # [rows, N] @ [N, in]
        score *= weight[start:stop].abs().float()
        bits = score.view(torch.int32).view(-1)
        if bool((bits < 0).any()) or not bool(torch.isfinite(score).all()):
            raise ValueError(
                f"importance of rows {start}..{stop - 1} holds a NaN, infinite or negative value: check the "
                "weight and the probe statistics"
            )
        yield bits


def _locate(blocks: Iterator[torch.Tensor], k: int) -> tuple[int, int]:
    """Of 16-bit numbers: the k-th smallest (k from 1), and how many are smaller than it."""
    histogram = reduce(torch.add, (torch.bincount(block, minlength=_BUCKETS) for block in blocks))
    cumulative = histogram.cumsum(0)
    number = int(torch.searchsorted(cumulative, k))
    return number, int(cumulative[number - 1]) if number else 0
