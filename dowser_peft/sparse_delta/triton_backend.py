"""Scatter and gather of a sparse delta straight from the packed mask, in Triton.

    scatter   out[p] = weight[p] + values[rank(p)] where bit p is set, weight[p] elsewhere
    gather    values[rank(p)] = dense[p] where bit p is set
    rank(p)   = offsets[p // CHUNK] + number of set bits of the chunk before p

One program serves one chunk of ``CHUNK`` consecutive weights: it loads their ``CHUNK / 8`` mask bytes, counts
the bits of each byte, and one scan over the bytes gives every weight its place among the values. So 1 bit a
weight and 8 bytes a chunk are read instead of 4 bytes per trained weight, and values are read and written in
order. A tile is ``[bytes, 8]``: eight neighbouring weights belong to one thread, one vector load.

Nothing here waits for the GPU. A mask whose bits do not number the values is not detected here, but never
reads or writes out of bounds: a rank past the last value counts as not set.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

CHUNK = 4096


@triton.jit
def _count_bits(byte):
    """Set bits of numbers below 256, in int32."""
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


@triton.jit
def _count_kernel(mask, counts, mask_bytes, BYTES: tl.constexpr):
    """counts[c] = set bits of chunk c."""
    chunk = tl.program_id(0).to(tl.int64)
    at = chunk * BYTES + tl.arange(0, BYTES)
    byte = tl.load(mask + at, mask=at < mask_bytes, other=0).to(tl.int32)
    tl.store(counts + chunk, tl.sum(_count_bits(byte), axis=0))


@triton.jit
def _ranks(mask, offsets, chunk, mask_bytes, k, BYTES: tl.constexpr):
    """For the weights of a chunk, ``[BYTES, 8]``: whether they are selected, and their rank in it; its first rank."""
    at = chunk * BYTES + tl.arange(0, BYTES)
    byte = tl.load(mask + at, mask=at < mask_bytes, other=0).to(tl.int32)
    count = _count_bits(byte)
    before = tl.cumsum(count, axis=0) - count  # within the chunk, at most CHUNK
    bit = tl.arange(0, 8)[None, :]
    earlier_bits = _count_bits(byte[:, None] & ((1 << bit) - 1))
    rank = before[:, None] + earlier_bits
    first = tl.load(offsets + chunk)
    left = tl.maximum(tl.minimum(k - first, BYTES * 8), 0).to(tl.int32)
    selected = (((byte[:, None] >> bit) & 1) != 0) & (rank < left)
    return selected, rank, first


@triton.jit
def _places(start, columns, stride_row, stride_column, CONTIGUOUS: tl.constexpr, BYTES: tl.constexpr):
    """Flat indices of a chunk, ``[BYTES, 8]``, and where they lie in a strided matrix."""
    flat = start + (tl.arange(0, BYTES)[:, None] * 8 + tl.arange(0, 8)[None, :])
    place = flat
    if not CONTIGUOUS:
        place = (flat // columns) * stride_row + (flat % columns) * stride_column
    return flat, place


@triton.jit
def _scatter_kernel(
    weight,
    out,
    masks,
    offsets,
    values,
    sizes,
    numel,
    mask_bytes,
    columns,
    stride_row,
    stride_column,
    DELTAS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """out = weight + scatter(values), delta after delta: each sum in float32, rounded once to weight's dtype."""
    chunk = tl.program_id(0).to(tl.int64)
    flat, place = _places(chunk * (BYTES * 8), columns, stride_row, stride_column, CONTIGUOUS, BYTES)
    entry = tl.load(weight + place, mask=flat < numel)
    for index in tl.static_range(DELTAS):
        selected, rank, first = _ranks(masks[index], offsets[index], chunk, mask_bytes, sizes[index], BYTES)
        delta = tl.load(values[index] + first + rank, mask=selected, other=0.0)
        entry = tl.where(selected, (entry.to(tl.float32) + delta.to(tl.float32)).to(entry.dtype), entry)
    tl.store(out + flat, entry.to(out.dtype.element_ty), mask=flat < numel)


@triton.jit
def _gather_kernel(
    dense,
    values,
    mask,
    offsets,
    size,
    numel,
    mask_bytes,
    columns,
    stride_row,
    stride_column,
    CONTIGUOUS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """values = dense at the set bits, in order."""
    chunk = tl.program_id(0).to(tl.int64)
    flat, place = _places(chunk * (BYTES * 8), columns, stride_row, stride_column, CONTIGUOUS, BYTES)
    selected, rank, first = _ranks(mask, offsets, chunk, mask_bytes, size, BYTES)
    entry = tl.load(dense + place, mask=flat < numel)  # all of it: whole vectors, and few sectors hold no set bit
    tl.store(values + first + rank, entry.to(values.dtype.element_ty), mask=selected)


def chunk_offsets(mask: torch.Tensor) -> torch.Tensor:
    """Set bits before each chunk of a packed mask: int64 ``[chunks + 1]``, the last is their number."""
    chunks = triton.cdiv(mask.numel() * 8, CHUNK)
    counts = torch.empty(chunks, dtype=torch.int32, device=mask.device)
    offsets = torch.zeros(chunks + 1, dtype=torch.int64, device=mask.device)
    if chunks:
        with _on(mask.device):
            _count_kernel[(chunks,)](mask, counts, mask.numel(), BYTES=CHUNK // 8)
        torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def scatter_into(
    out: torch.Tensor,
    weight: torch.Tensor,
    masks: Sequence[torch.Tensor],
    offsets: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Write ``weight`` plus every delta into the contiguous ``out`` (which may be ``weight``), in one pass.

    Args:
        out: ``[rows, columns]``; if of another dtype than ``weight``, the result is converted last.
        weight: ``[rows, columns]``, any strides, float32, bfloat16 or float16.
        masks: per delta, packed mask of ``rows * columns`` bits.
        offsets: per delta, :func:`chunk_offsets` of its mask.
        values: per delta, ``[k]``, float32 or narrower.
    """
    if weight.numel() == 0:
        return out
    with _on(weight.device):
        _scatter_kernel[(triton.cdiv(weight.numel(), CHUNK),)](
            weight,
            out,
            tuple(masks),
            tuple(offsets),
            tuple(delta.contiguous() for delta in values),
            tuple(delta.numel() for delta in values),
            weight.numel(),
            (weight.numel() + 7) // 8,
            *_layout(weight),
            DELTAS=len(masks),
            CONTIGUOUS=weight.is_contiguous(),
            BYTES=CHUNK // 8,
        )
    return out


def gather_delta(
    dense: torch.Tensor, mask: torch.Tensor, offsets: torch.Tensor, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Entries of a dense gradient ``[rows, columns]`` at the ``size`` set bits of a packed mask: ``[size]``."""
    values = torch.zeros(size, dtype=dtype, device=dense.device)  # what a mask with too few bits leaves
    if dense.numel():
        with _on(dense.device):
            _gather_kernel[(triton.cdiv(dense.numel(), CHUNK),)](
                dense,
                values,
                mask,
                offsets,
                size,
                dense.numel(),
                mask.numel(),
                *_layout(dense),
                CONTIGUOUS=dense.is_contiguous(),
                BYTES=CHUNK // 8,
            )
    return values


def _layout(matrix: torch.Tensor) -> tuple[int, int, int]:
    return matrix.shape[-1], matrix.stride(0), matrix.stride(-1)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
