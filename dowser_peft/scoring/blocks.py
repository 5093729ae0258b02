"""Scores one row block at a time: what every selection in torch reads, and the only place that computes them.

The one-pass selection and the three-pass reference see the very same blocks, hence the same bits, hence choose
the same mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

# 4 MB of float32 scores at a time: large enough for a GEMM at full speed, small enough to stay in the cache.
_BLOCK_ELEMENTS = 1 << 20


class RowBlocks(Protocol):
    """A weight ``[out, in]`` that exists a few rows at a time, such as a quantised one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``weight[start:stop]``, ``[stop - start, in]``."""
        ...

    def entries(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """``weight[rows, columns]``, of index vectors of one length."""
        ...


def rows_of(weight: torch.Tensor | RowBlocks, start: int, stop: int) -> torch.Tensor:
    """``weight[start:stop]``, ``[stop - start, in]``."""
    return weight[start:stop] if isinstance(weight, torch.Tensor) else weight.rows(start, stop)


def entries_of(weight: torch.Tensor | RowBlocks, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``weight[rows, columns]``, of index vectors of one length."""
    return weight[rows, columns] if isinstance(weight, torch.Tensor) else weight.entries(rows, columns)


def row_ranges(shape: torch.Size, block_elements: int) -> Iterator[tuple[int, int]]:
    """Consecutive ``(start, stop)`` of about ``block_elements`` entries, in eights of rows.

    Eight rows fill whole bytes of a mask, whatever their length.
    """
    out_features, in_features = shape
    rows = max(8, block_elements // max(1, in_features) // 8 * 8)
    for start in range(0, out_features, rows):
        yield start, min(start + rows, out_features)


@torch.no_grad()
def score_blocks(
    weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (flat index of the first score, float32 scores ``[rows * in]``), block after block.

    The scores lie in a buffer that the next block overwrites. ``activation`` ``[N, in]`` and ``sensitivity``
    ``[N, out]`` are float32, non-negative and on the device of ``weight``.

    Raises:
        ValueError: if a score is NaN or infinite; the message names the rows.
    """
    in_features = weight.shape[1]
    sensitivity = sensitivity.T.contiguous()  # [out, N]
    score_buffer = torch.empty(0, in_features, device=weight.device)
    weight_buffer = torch.empty(0, in_features, device=weight.device)
    for start, stop in row_ranges(weight.shape, _BLOCK_ELEMENTS):
        block = rows_of(weight, start, stop)
        if not len(score_buffer):
            score_buffer = torch.empty(stop - start, in_features, device=weight.device)
            weight_buffer = score_buffer if block.dtype == torch.float32 else torch.empty_like(score_buffer)
        score = score_buffer[: stop - start]
        if block.dtype != torch.float32:  # converting first is faster than a product of mixed types
            block = weight_buffer[: stop - start].copy_(block)
        torch.mm(sensitivity[start:stop], activation, out=score)  # [rows, N] @ [N, in]
        score.mul_(block).abs_()  # the factors are not negative, so this is |W| times their product
        if score.numel() and not bool(score.amax() < torch.inf):
            raise ValueError(invalid_score(start, stop - 1))
        yield start * in_features, score.view(-1)


def check_factors(activation: torch.Tensor, sensitivity: torch.Tensor) -> None:
    """Refuse factors that make a score NaN or negative, naming the first row: ``score_blocks`` takes |score|."""
    if not bool((activation >= 0).all()):
        raise ValueError(invalid_score(0, sensitivity.shape[1] - 1))
    valid_rows = (sensitivity >= 0).all(0)
    if not bool(valid_rows.all()):
        row = int(valid_rows.int().argmin())
        raise ValueError(invalid_score(row, row))


def invalid_score(first_row: int, last_row: int) -> str:
    """The message about scores that cannot be ranked."""
    rows = f"row {first_row}" if first_row == last_row else f"rows {first_row}..{last_row}"
    return f"importance of {rows} holds a NaN, infinite or negative value: check the weight and the probe statistics"
