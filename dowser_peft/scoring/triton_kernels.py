"""Triton kernels of the selection. Every pass computes the score tile by the same function, hence the same bits.

    S_ij = |W_ij| * sum_n psi_ni * a_nj          W [out, in], psi [N, out], a [N, in], all sums in float32

Launch, by reasoning for an H100 (67 TFLOP/s of float32, 3.3 TB/s, 132 SMs with 64 K registers each), not yet
timed on one: at N = 64 a weight costs 128 FLOP and 2 bytes, 1.9 ps of arithmetic against 0.6 ps of memory, so
the float32 units bound the pass. A sum of N rank-1 updates feeds them without shared memory: a tile of 32 x 128
over 128 threads is 4 x 8 scores a thread, 32 multiply-adds for 12 loaded factors, which the threads share in
the L1 cache. Compiled for sm_90, counting takes 94 registers and emitting 63, without spills: five and eight
programs an SM. 64 x 128 would take 194 and 128, hence two and four. A 4096 x 4096 layer has 4096 programs.

Flat indices are int64: a layer may have more than 2^31 weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY_BITS = tl.constexpr(0x7F800000)

# Slots of the int64 state on the device.
LOW = tl.constexpr(0)  # bit pattern where the histogram starts
SHIFT = tl.constexpr(1)  # each bin holds 2^SHIFT patterns
BELOW = tl.constexpr(2)  # scores below LOW
DONE = tl.constexpr(3)  # 0: counting, 1: LIMIT is exact, 2: the k-th smallest is outside the histogram
LIMIT = tl.constexpr(4)  # the k-th smallest
TIES = tl.constexpr(5)  # how many scores equal to LIMIT enter
EQUAL = tl.constexpr(6)  # how many there are
BAD_ROW = tl.constexpr(7)  # the first row with a NaN, infinite or negative score


@triton.jit
def score_tile(
    weight, activation, sensitivity, num_prompts, out_features, in_features,
    stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so,
    rows, columns,
):  # fmt: skip
    """Bit patterns [R, C] of the scores, and which of them exist. ``weight`` points to the first of ``rows``."""
    inside_rows = rows < out_features
    inside_columns = columns < in_features
    total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for n in range(num_prompts):
        psi = tl.load(sensitivity + n * stride_sn + rows * stride_so, mask=inside_rows, other=0.0)  # [R]
        a = tl.load(activation + n * stride_an + columns * stride_ai, mask=inside_columns, other=0.0)  # [C]
        total += psi[:, None] * a[None, :]
    inside = inside_rows[:, None] & inside_columns[None, :]
    where = rows.to(tl.int64)[:, None] * stride_wo + columns.to(tl.int64)[None, :] * stride_wi
    w = tl.load(weight + where, mask=inside, other=0.0).to(tl.float32)
    return (tl.abs(w) * total).to(tl.int32, bitcast=True), inside


@triton.jit
def sample_kernel(
    weight, activation, sensitivity, num_prompts, in_features,
    stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so,
    positions, sample, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bit patterns of the scores at some flat ``positions``, a multiple of BLOCK of them."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + slots)
    row, column = position // in_features, position % in_features
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for n in range(num_prompts):
        psi = tl.load(sensitivity + n * stride_sn + row * stride_so)
        total += psi * tl.load(activation + n * stride_an + column * stride_ai)
    w = tl.load(weight + row * stride_wo + column * stride_wi).to(tl.float32)
    tl.store(sample + slots, (tl.abs(w) * total).to(tl.int32, bitcast=True))


@triton.jit
def start_kernel(state, sample, first, last, sample_size, ROUNDING: tl.constexpr, LOG2_BINS: tl.constexpr):
    """LOW and SHIFT of a histogram that spans the ranks ``first`` to ``last`` of the sorted sample."""
    low = tl.load(sample + tl.maximum(first, 0)).to(tl.int64) - ROUNDING
    high = tl.load(sample + tl.minimum(last, sample_size - 1)).to(tl.int64) + ROUNDING
    low = tl.where(first < 0, 0, tl.maximum(low, 0))
    width = tl.where(last >= sample_size, INFINITY_BITS, high) - low
    shift = width * 0
    for i in range(31 - LOG2_BINS):
        shift += tl.where((width >> i) >> LOG2_BINS > 0, 1, 0)
    tl.store(state + LOW, low)
    tl.store(state + SHIFT, shift)


@triton.jit
def count_kernel(
    weight, activation, sensitivity, num_prompts, out_features, in_features,
    stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so,
    first_row, state, histogram,
    LOG2_BINS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count the scores below LOW, and histogram those in the 2^LOG2_BINS bins of 2^SHIFT patterns above it."""
    if tl.load(state + DONE) == 0:
        rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        bits, inside = score_tile(
            weight, activation, sensitivity, num_prompts, out_features, in_features,
            stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so, rows, columns,
        )  # fmt: skip
        invalid = inside & ((bits < 0) | (bits >= INFINITY_BITS))
        bad_row = tl.min(tl.where(tl.max(invalid.to(tl.int32), axis=1) > 0, rows, 0x7FFFFFFF), axis=0)
        if bad_row < 0x7FFFFFFF:
            tl.atomic_min(state + BAD_ROW, bad_row.to(tl.int64) + first_row)

        low = tl.load(state + LOW).to(tl.int32)
        shift = tl.load(state + SHIFT).to(tl.int32)
        below = tl.sum(tl.sum((inside & (bits < low)).to(tl.int32), axis=1), axis=0)
        tl.atomic_add(state + BELOW, below.to(tl.int64))
        bins = (bits - low) >> shift
        counted = inside & (bits >= low) & (bins < (1 << LOG2_BINS)) & (bits < INFINITY_BITS)
        tl.atomic_add(histogram + bins, 1, mask=counted)


@triton.jit
def locate_kernel(state, coarse, histogram, k, COARSE: tl.constexpr, FINE: tl.constexpr):
    """Find the k-th smallest: exactly if SHIFT is 0, else the bin to look into next."""
    if tl.load(state + DONE) == 0:
        below = tl.load(state + BELOW)
        counts = tl.load(coarse + tl.arange(0, COARSE)).to(tl.int64)
        missing = k - below  # rank, from 1, inside the histogram
        if (missing < 1) | (missing > tl.sum(counts, axis=0)):
            tl.store(state + DONE, 2)
        else:
            passed = tl.cumsum(counts, axis=0) < missing
            chunk = tl.sum(passed.to(tl.int32), axis=0)
            missing -= tl.sum(tl.where(passed, counts, 0), axis=0)
            counts = tl.load(histogram + chunk * FINE + tl.arange(0, FINE)).to(tl.int64)
            passed = tl.cumsum(counts, axis=0) < missing
            fine = tl.sum(passed.to(tl.int32), axis=0)
            missing -= tl.sum(tl.where(passed, counts, 0), axis=0)
            shift = tl.load(state + SHIFT)
            low = tl.load(state + LOW) + ((chunk * FINE + fine).to(tl.int64) << shift)
            if shift == 0:
                tl.store(state + DONE, 1)
                tl.store(state + LIMIT, low)
                tl.store(state + TIES, missing)
                tl.store(state + EQUAL, tl.sum(tl.where(tl.arange(0, FINE) == fine, counts, 0), axis=0))
            else:
                tl.store(state + LOW, low)
                tl.store(state + SHIFT, low * 0)
                tl.store(state + BELOW, low * 0)  # the next pass counts anew


@triton.jit
def emit_kernel(
    weight, activation, sensitivity, num_prompts, out_features, in_features,
    stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so,
    first_row, state, mask, ties_of_row,
    WHOLE_BYTES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Set the bits of the scores below LIMIT, and of those equal to it if all of them enter.

    If not all enter, count them per row instead. WHOLE_BYTES: rows end on mask bytes, so a tile owns its bytes
    and stores them; otherwise bytes are shared by rows, and each bit is set in its 32-bit word by an atomic OR.
    """
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    bits, inside = score_tile(
        weight, activation, sensitivity, num_prompts, out_features, in_features,
        stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so, rows, columns,
    )  # fmt: skip
    limit = tl.load(state + LIMIT).to(tl.int32)
    surplus = tl.load(state + TIES) < tl.load(state + EQUAL)
    selected = inside & (bits < tl.where(surplus, limit, limit + 1))
    row_start = (rows.to(tl.int64) + first_row) * in_features
    if WHOLE_BYTES:
        grouped = tl.reshape(selected.to(tl.int32), (BLOCK_R, BLOCK_C // 8, 8))
        byte = tl.sum(grouped << tl.arange(0, 8)[None, None, :], axis=2)
        byte_columns = tl.program_id(0) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        where = (row_start // 8)[:, None] + byte_columns[None, :]
        owned = (rows < out_features)[:, None] & (byte_columns * 8 < in_features)[None, :]
        tl.store(mask + where, byte.to(tl.uint8), mask=owned)
    else:
        flat = row_start[:, None] + columns[None, :]
        tl.atomic_or(mask + flat // 32, 1 << (flat % 32).to(tl.int32), mask=selected)
    if surplus:
        ties = tl.sum((inside & (bits == limit)).to(tl.int32), axis=1)
        tl.atomic_add(ties_of_row + first_row + rows, ties, mask=(rows < out_features) & (ties > 0))


@triton.jit
def ties_kernel(
    weight, activation, sensitivity, num_prompts, out_features, in_features,
    stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so,
    first_row, state, mask, ties_before_row,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Set the bits of the first TIES scores equal to LIMIT, in row-major order; a program owns whole rows."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    limit = tl.load(state + LIMIT).to(tl.int32)
    left = tl.load(state + TIES) - tl.load(ties_before_row + first_row + rows, mask=rows < out_features, other=0)
    row_start = (rows.to(tl.int64) + first_row) * in_features
    if tl.max(left, axis=0) > 0:
        for start in range(0, in_features, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            bits, inside = score_tile(
                weight, activation, sensitivity, num_prompts, out_features, in_features,
                stride_wo, stride_wi, stride_an, stride_ai, stride_sn, stride_so, rows, columns,
            )  # fmt: skip
            equal = (inside & (bits == limit)).to(tl.int32)
            entering = (equal > 0) & (tl.cumsum(equal, axis=1) <= left[:, None])
            left -= tl.sum(equal, axis=1)
            flat = row_start[:, None] + columns[None, :]
            tl.atomic_or(mask + flat // 32, 1 << (flat % 32).to(tl.int32), mask=entering)
