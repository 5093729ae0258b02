"""Scatter and gather of a sparse delta in plain torch, by flat positions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch

# Weights of the dense gradient that exist at a time on a CPU: 16 MB in float32.
_BLOCK_WEIGHTS = 1 << 22
# Up to this share of the weights, single entries of the gradient cost less than the dense product (LOG.md).
_SAMPLED_SHARE = 0.2
SAMPLED_TOKENS = 128  # at a time: the factors stay in cache, their copies small


@torch.no_grad()
def scatter_into(
    out: torch.Tensor,
    weight: torch.Tensor,
    positions: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Write ``weight`` plus every delta into ``out``, contiguous and of the same dtype (it may be ``weight`` itself).

    The sum of an entry and its delta is taken in float32 (float64 for a float64 weight) and rounded once to
    the dtype of the weight, delta after delta, so that a delta which is small against its weight is not
    rounded before it is added.
    """
    if out is not weight:
        out.copy_(weight)
    flat = out.view(-1)
    for where, delta in zip(positions, values, strict=True):
        wide = torch.promote_types(delta.dtype, torch.float32)
        if out.dtype == wide == delta.dtype:
            flat.index_add_(0, where, delta)
        else:
            flat[where] = _sum(flat, where, delta)
    return out


@torch.no_grad()
def convert_and_scatter_into(
    out: torch.Tensor, weight: torch.Tensor, positions: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The same for one delta where ``out`` has another dtype: the sums are converted after their rounding."""
    out.copy_(weight)
    out.view(-1)[positions] = _sum(weight.reshape(-1), positions, values).to(out.dtype)
    return out


def _sum(flat: torch.Tensor, where: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return add_once_rounded(flat.index_select(0, where), delta)


def add_once_rounded(entries: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Entries of a weight plus their deltas, summed in float32 (float64 if one of them is) and rounded once."""
    wide = torch.promote_types(torch.promote_types(delta.dtype, entries.dtype), torch.float32)
    return (entries.to(wide) + delta).to(entries.dtype)


def gather_delta(grad_weight: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Entries of a dense gradient at ``positions``: ``[k]`` in ``dtype``."""
    return grad_weight.reshape(-1).index_select(0, positions).to(dtype)


def is_sampled(positions: Sequence[torch.Tensor], left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether entries of ``left^T @ right`` on a CPU are computed one by one: they are few, the dtype is wide."""
    share = sum(where.numel() for where in positions) / max(1, left.shape[1] * right.shape[1])
    return share <= _SAMPLED_SHARE and left.dtype in (torch.float32, torch.float64)


def sample_product(left: torch.Tensor, right: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Entries of ``left^T @ right`` at ``positions`` and no others, on a CPU: ``[k]`` in the dtype of the factors.

    Args:
        left: ``[tokens, rows]``.
        right: ``[tokens, columns]``.
        positions: ascending flat indices ``[k]`` into ``[rows, columns]``.
    """
    shape = rows, columns = left.shape[1], right.shape[1]
    starts = torch.arange(0, rows * columns + 1, columns, dtype=positions.dtype)
    offsets = torch.searchsorted(positions, starts, out_int32=positions.dtype == torch.int32)
    _expect_beta_warning()
    found = torch.sparse_csr_tensor(
        offsets, positions % columns, left.new_zeros(positions.numel()), shape, check_invariants=False
    )
    for start in range(0, len(left), SAMPLED_TOKENS):
        tokens = slice(start, start + SAMPLED_TOKENS)
        # each entry is a product of two contiguous vectors: a row of left^T, a column of right
        left_t, right_t = left[tokens].T.contiguous(), right[tokens].T.contiguous()
        torch.sparse.sampled_addmm(found, left_t, right_t.T, out=found)  # [rows, tokens] @ [tokens, columns]
        del left_t, right_t  # before the next ones are made
    return found.values()


@cache
def _expect_beta_warning() -> None:
    """PyTorch says once a process that its CSR tensors are in beta; that is not for our users to act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=True)


def block_shape(rows: int, columns: int) -> tuple[int, int]:
    """Of the dense gradient ``[rows, columns]``: how much :func:`gather_product` computes at a time."""
    return max(1, min(rows, _BLOCK_WEIGHTS // max(1, columns))), columns


def gather_product(
    left: torch.Tensor,
    right: torch.Tensor,
    positions: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
    block: torch.Tensor,
) -> list[torch.Tensor]:
    """Entries of ``left^T @ right`` at ``positions``, on a CPU: the product exists one block of rows at a time.

    Args:
        left: ``[tokens, rows]``.
        right: ``[tokens, columns]``.
        positions: per delta, ascending flat indices ``[k]`` into ``[rows, columns]``.
        dtypes: per delta, dtype of its result.
        block: memory of the product, :func:`block_shape`.
    """
    rows, (step, columns) = left.shape[1], block.shape
    edges = torch.arange(0, rows + step, step).clamp_(max=rows) * columns
    bounds = [torch.searchsorted(where, edges.to(where.dtype)).tolist() for where in positions]
    found = [torch.empty(where.numel(), dtype=dtype) for where, dtype in zip(positions, dtypes, strict=True)]
    for index, start in enumerate(range(0, rows, step)):
        stop = min(start + step, rows)
        product = torch.mm(
            left[:, start:stop].T, right, out=block[: stop - start]
        )  # [rows, tokens] @ [tokens, columns]
        for where, bound, result in zip(positions, bounds, found, strict=True):
            part = slice(bound[index], bound[index + 1])
            result[part] = product.view(-1).index_select(0, where[part] - start * columns)
    return found
