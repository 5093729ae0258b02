"""Scatter and gather of a sparse delta in plain torch, by flat positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Weights of the dense gradient that exist at a time on a CPU: 16 MB in float32.
_BLOCK_WEIGHTS = 1 << 22


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
    wide = torch.promote_types(delta.dtype, torch.float32)
    return (flat.index_select(0, where).to(wide) + delta).to(flat.dtype)


def gather_delta(grad_weight: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Entries of a dense gradient at ``positions``: ``[k]`` in ``dtype``."""
    return grad_weight.reshape(-1).index_select(0, positions).to(dtype)


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
