"""Weights that bitsandbytes quantised, dequantised a few rows or entries at a time.

Bit for bit what dequantising the whole weight gives, without the memory for it.
"""

from __future__ import annotations

from typing import Any

import torch

_SMALL_BLOCK = 64


class BlockwiseWeight:
    """A quantised weight ``[out, in]``; see ``scoring.blocks.RowBlocks`` for what reads it."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.shape, self.device = shape, device

    def numel(self) -> int:
        return self.shape.numel()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """``weight[start:stop]``, ``[stop - start, in]``."""
        raise NotImplementedError

    def entries(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """``weight[rows, columns]``, of index vectors of one length."""
        raise NotImplementedError


class Weight8bit(BlockwiseWeight):
    """int8 ``[out, in]`` with one float32 scale a row, ``scale`` ``[out]``."""

    def __init__(self, quantised: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__(quantised.shape, quantised.device)
        self._quantised, self._scale = quantised, scale

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return _dequantised_8bit(self._quantised[start:stop], self._scale[start:stop])

    def entries(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return _dequantised_8bit(self._quantised[rows, columns].unsqueeze(1), self._scale[rows]).squeeze(1)


class Weight4bit(BlockwiseWeight):
    """nf4 or fp4, two weights a byte, one scale for ``blocksize`` consecutive weights of the flat matrix.

    Rows must consist of whole blocks (``fits``). The scales, float32 and quantised themselves under double
    quantisation, are unpacked once: 1 byte for 16 weights at blocksize 64.
    """

    @staticmethod
    def fits(state: Any) -> bool:
        """Whether rows consist of whole blocks.

        Where they do not, bitsandbytes 0.50 on a CPU takes scales that depend on the rows around, so that parts
        would differ from the whole, which is what the layer computes with.
        """
        return state is not None and state.shape[1] % state.blocksize == 0

    def __init__(self, packed: torch.Tensor, state: Any) -> None:
        from bitsandbytes.functional import dequantize_blockwise

        super().__init__(torch.Size(state.shape), packed.device)
        self._packed, self._state = packed.reshape(-1).view(torch.uint8), state
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        self._scales = scales.float()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        in_features, size = self.shape[1], self._state.blocksize
        packed = self._packed[start * in_features // 2 : stop * in_features // 2]
        scales = self._scales[start * in_features // size : stop * in_features // size]
        return self._dequantised(packed, scales, torch.Size((stop - start, in_features)), size)

    def entries(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        flat = rows * self.shape[1] + columns
        # Each byte fills a block of its own, which takes the scale of the block where the byte lies.
        blocks = self._packed[flat // 2, None].expand(-1, _SMALL_BLOCK // 2).reshape(-1)
        scales = self._scales[flat // self._state.blocksize]
        pairs = self._dequantised(blocks, scales, torch.Size((len(flat), _SMALL_BLOCK)), _SMALL_BLOCK)
        return pairs[torch.arange(len(flat), device=flat.device), flat % 2]

    def _dequantised(
        self, packed: torch.Tensor, scales: torch.Tensor, shape: torch.Size, blocksize: int
    ) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            absmax=scales.contiguous(),
            shape=shape,
            code=self._state.code,
            blocksize=blocksize,
            quant_type=self._state.quant_type,
            dtype=self._state.dtype,
        )
        return dequantize_4bit(packed.view(-1, 1), state).view(shape)


def _dequantised_8bit(quantised: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(quantised, scale)
