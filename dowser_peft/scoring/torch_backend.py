"""The selection on a CPU: one pass over the weight.

    1. score a small sample; from it, an interval [low, high] that holds the k-th smallest, near certainly;
    2. in one pass over row blocks, emit the bit of every score below ``low``, count these, and collect the few
       candidates inside the interval;
    3. rank the candidates exactly and set the bits of those that enter.

The count tells for certain whether the interval was right. Where it was not, or where too many scores crowd in
it (a layer full of zeros), the three passes of :mod:`~dowser_peft.scoring.reference` decide; the mask is the
same either way, since both read the same blocks. A GPU without Triton takes the reference at once.

Cost per weight, N prompts: 2 N FLOP, one read of the weight, 1 bit written. Beside the mask and N (in + out)
floats of factors, it takes some 40 MB, whatever the layer.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from dowser_peft import bitmask
from dowser_peft.scoring import reference
from dowser_peft.scoring.blocks import RowBlocks, check_factors, entries_of, score_blocks
from dowser_peft.scoring.sampling import enclosing_ranks, sample_positions, sample_size

_MAX_CANDIDATES = 1 << 20  # 12 MB of positions and scores, as much again to rank them
_SAMPLE_CHUNK = 1 << 12  # 1 MB a factor at N = 64
_LEAST_SAMPLE = 1 << 10  # below, every score is a candidate
_ALL = (0.0, math.inf)
_ROUNDING = 1e-5  # the sample sums in another order: a crowd of equal scores must not fall just outside


@torch.no_grad()
def bottom_k_mask(
    weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor, k: int
) -> torch.Tensor:
    """Packed mask of exactly ``k`` lowest scores of ``|weight| * (sensitivity^T @ activation)``.

    The factors are float32 on the device of ``weight``; raises as :func:`dowser_peft.scoring.bottom_rho_mask`.
    """
    check_factors(activation, sensitivity)
    mask = None
    if weight.device.type == "cpu":
        interval = _interval(weight, activation, sensitivity, k)
        mask = _one_pass(weight, activation, sensitivity, k, *interval) if interval else None
    return reference.bottom_k_mask(weight, activation, sensitivity, k) if mask is None else mask


def _interval(
    weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor, k: int
) -> tuple[float, float] | None:
    """Scores (low, high) that enclose the k-th smallest, near certainly; None if no sample can tell."""
    numel, in_features = weight.shape.numel(), weight.shape[1]
    size = sample_size(k, numel, _MAX_CANDIDATES)
    if size < _LEAST_SAMPLE:
        return _ALL
    positions = sample_positions(numel, size, weight.device)
    activation, sensitivity = activation.T.contiguous(), sensitivity.T.contiguous()  # [in, N], [out, N]
    parts = []
    for chunk in positions.split(_SAMPLE_CHUNK):
        rows, columns = chunk // in_features, chunk % in_features
        products = sensitivity[rows].mul_(activation[columns])  # [chunk, N]
        parts.append(products.sum(1).mul_(entries_of(weight, rows, columns)).abs_())
    sample = torch.cat(parts).sort().values
    first, last = enclosing_ranks(k, numel, size)
    low = float(sample[first]) * (1 - _ROUNDING) if first >= 0 else 0.0
    high = float(sample[last]) * (1 + _ROUNDING) if last < size else math.inf
    return low, high


def _one_pass(
    weight: torch.Tensor | RowBlocks,
    activation: torch.Tensor,
    sensitivity: torch.Tensor,
    k: int,
    low: float,
    high: float,
) -> torch.Tensor | None:
    """The mask, or None if the k-th smallest is outside [low, high] or too many scores are inside."""
    low, high = np.float32(low), np.float32(high)
    packed = np.empty(bitmask.packed_size(weight.shape.numel()), dtype=np.uint8)
    positions, scores, candidates, below = [], [], 0, 0
    for start, block in score_blocks(weight, activation, sensitivity):
        score = block.numpy()
        selected = score < low
        below += np.count_nonzero(selected)
        first_byte = start // 8
        bits = np.packbits(selected, bitorder="little")
        packed[first_byte : first_byte + len(bits)] = bits

        np.less_equal(score, high, out=selected)  # a superset: only their difference is looked at bit by bit
        bits ^= np.packbits(selected, bitorder="little")
        bytes_inside = np.flatnonzero(bits != 0)  # numpy searches booleans far faster than bytes
        inside = np.flatnonzero(np.unpackbits(bits[bytes_inside], bitorder="little").view(bool))
        where = bytes_inside[inside >> 3] * 8 + (inside & 7)
        candidates += len(where)
        if below >= k or candidates > _MAX_CANDIDATES:
            return None
        positions.append(where + start)
        scores.append(score[where])
    if below + candidates < k:
        return None
    entering = _lowest(np.concatenate(scores), k - below)
    position = np.concatenate(positions)[entering]
    np.bitwise_or.at(packed, position >> 3, np.left_shift(1, position & 7).astype(np.uint8))
    return torch.from_numpy(packed)


def _lowest(scores: np.ndarray, k: int) -> np.ndarray:
    """Boolean mask of the ``k`` lowest of ``scores``, the first ones among equals."""
    threshold = np.partition(scores, k - 1)[k - 1]
    lowest = scores < threshold
    ties = np.flatnonzero(scores == threshold)
    lowest[ties[: k - np.count_nonzero(lowest)]] = True
    return lowest
