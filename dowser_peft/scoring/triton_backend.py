"""The selection on a GPU: two passes over the weight, with the threshold searched on the device.

    1. score a small sample; its order statistics enclose the k-th smallest, near certainly;
    2. count the scores below that interval, and histogram the few inside it, finely enough that a bin is one
       float32 bit pattern (a second count looks into one bin where it is not);
    3. emit the mask bits. Only if some, but not all, of the scores equal to the threshold enter, a further pass
       sets the bits of the first ones.

The host waits once, at the end, to learn whether the interval was right. If not, the same passes run over all
bit patterns, which finds the threshold for certain. Integer atomics alone combine the programs: the mask is the
same on every run. Extra memory: 4 MB of histogram, 1 MB of sample, 4 bytes a row, whatever the layer; row
blocks of a weight that does not exist as a whole take 8 MB more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from dowser_peft import bitmask
from dowser_peft.scoring import triton_kernels as kernels
from dowser_peft.scoring.blocks import RowBlocks, check_factors, invalid_score, row_ranges
from dowser_peft.scoring.sampling import enclosing_ranks, sample_positions

_LOG2_BINS = 20
_ALL_SHIFT = 31 - _LOG2_BINS  # with which the bins span every pattern of a non-negative float32
_SAMPLE = 1 << 14
_SAMPLE_BLOCK = 128
_ROUNDING = 128  # bit patterns: the sample sums in another order than the tiles
_ROW_BLOCK_ELEMENTS = 1 << 21  # 8 MB as float32
_BLOCK_R, _BLOCK_C, _NUM_WARPS = 32, 128, 4
_TIES_BLOCK_R = 8
_NO_ROW = torch.iinfo(torch.int64).max


@torch.no_grad()
def bottom_k_mask(
    weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor, k: int
) -> torch.Tensor:
    """Packed mask of exactly ``k`` lowest scores of ``|weight| * (sensitivity^T @ activation)``.

    The factors are float32 on the device of ``weight``; raises as :func:`dowser_peft.scoring.bottom_rho_mask`.
    """
    with _on(weight.device):  # of a model on several GPUs not every layer is on the current one
        selection = _Selection(weight, activation, sensitivity, k)
        mask = None
        if isinstance(weight, torch.Tensor) and weight.numel() >= 4 * _SAMPLE:
            mask = selection.run(sampled=weight)
        if mask is None:
            mask = selection.run(sampled=None)
    assert mask is not None  # without a sample, the histogram spans every score
    return mask


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _Selection:
    """The launches of one layer; they share the factors and the state on the device."""

    def __init__(
        self, weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor, k: int
    ) -> None:
        self.weight, self.activation, self.sensitivity, self.k = weight, activation, sensitivity, k
        self.numel = weight.shape.numel()
        self.state = torch.zeros(8, dtype=torch.int64, device=weight.device)
        self.histogram = torch.empty(1 << _LOG2_BINS, dtype=torch.int32, device=weight.device)

    def run(self, sampled: torch.Tensor | None) -> torch.Tensor | None:
        """The mask, searched from a sample of this weight or from nothing; None if the sample misled."""
        self.state.zero_()
        self.state[kernels.BAD_ROW.value] = _NO_ROW
        if sampled is None:
            self.state[kernels.SHIFT.value] = _ALL_SHIFT
        else:
            self._start_from_sample(sampled)
        for _ in range(2):  # the second looks into one bin of the first, unless that was exact
            self._count()
        mask_words, ties_of_row = self._emit()
        *_, done, _, ties, equal, bad_row = self.state.tolist()  # the host waits here
        if bad_row != _NO_ROW or done != 1:
            if sampled is not None and bad_row == _NO_ROW:
                return None
            check_factors(self.activation, self.sensitivity)
            raise ValueError(invalid_score(bad_row, bad_row))
        if ties < equal:
            self._emit_first_ties(mask_words, ties_of_row)
        packed = mask_words.view(torch.uint8)[: bitmask.packed_size(self.numel)]
        return packed if packed.numel() == mask_words.numel() * 4 else packed.clone()

    def _start_from_sample(self, weight: torch.Tensor) -> None:
        positions = sample_positions(self.numel, _SAMPLE, weight.device)
        sample = torch.empty(_SAMPLE, dtype=torch.int32, device=weight.device)
        kernels.sample_kernel[(_SAMPLE // _SAMPLE_BLOCK,)](
            weight, self.activation, self.sensitivity, len(self.activation), weight.shape[1],
            *weight.stride(), *self.activation.stride(), *self.sensitivity.stride(),
            positions, sample, BLOCK=_SAMPLE_BLOCK,
        )  # fmt: skip
        first, last = enclosing_ranks(self.k, self.numel, _SAMPLE)
        kernels.start_kernel[(1,)](
            self.state, sample.sort().values, first, last, _SAMPLE, ROUNDING=_ROUNDING, LOG2_BINS=_LOG2_BINS
        )

    def _count(self) -> None:
        self.histogram.zero_()
        for arguments, grid in self._tiles():
            kernels.count_kernel[grid](
                *arguments, self.state, self.histogram,
                LOG2_BINS=_LOG2_BINS, BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C, num_warps=_NUM_WARPS,
            )  # fmt: skip
        fine = 1 << _LOG2_BINS // 2
        coarse = self.histogram.view(-1, fine).sum(1)
        kernels.locate_kernel[(1,)](self.state, coarse, self.histogram, self.k, COARSE=len(coarse), FINE=fine)

    def _emit(self) -> tuple[torch.Tensor, torch.Tensor]:
        mask_words = torch.zeros(triton.cdiv(self.numel, 32), dtype=torch.int32, device=self.weight.device)
        ties_of_row = torch.zeros(self.weight.shape[0], dtype=torch.int32, device=self.weight.device)
        whole_bytes = self.weight.shape[1] % 8 == 0
        for arguments, grid in self._tiles():
            kernels.emit_kernel[grid](
                *arguments, self.state, mask_words.view(torch.uint8) if whole_bytes else mask_words, ties_of_row,
                WHOLE_BYTES=whole_bytes, BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C, num_warps=_NUM_WARPS,
            )  # fmt: skip
        return mask_words, ties_of_row

    def _emit_first_ties(self, mask_words: torch.Tensor, ties_of_row: torch.Tensor) -> None:
        ties_before_row = ties_of_row.cumsum(0) - ties_of_row  # int64
        for arguments, _ in self._tiles():
            grid = (triton.cdiv(arguments[4], _TIES_BLOCK_R),)
            kernels.ties_kernel[grid](
                *arguments, self.state, mask_words, ties_before_row,
                BLOCK_R=_TIES_BLOCK_R, BLOCK_C=_BLOCK_C, num_warps=_NUM_WARPS,
            )  # fmt: skip

    def _tiles(self) -> Iterator[tuple[tuple[Any, ...], tuple[int, int]]]:
        """Common arguments and grid of a pass: one launch, or one per row block of a weight that comes so."""
        out_features, in_features = self.weight.shape
        whole = isinstance(self.weight, torch.Tensor)
        ranges = [(0, out_features)] if whole else row_ranges(self.weight.shape, _ROW_BLOCK_ELEMENTS)
        for start, stop in ranges:
            block = self.weight if isinstance(self.weight, torch.Tensor) else self.weight.rows(start, stop)
            sensitivity = self.sensitivity[:, start:stop]
            arguments = (
                block, self.activation, sensitivity, len(self.activation), stop - start, in_features,
                *block.stride(), *self.activation.stride(), *sensitivity.stride(), start,
            )  # fmt: skip
            yield arguments, (triton.cdiv(in_features, _BLOCK_C), triton.cdiv(stop - start, _BLOCK_R))
