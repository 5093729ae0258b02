"""Scatter and gather of a sparse delta in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch


@torch.no_grad()
def scatter_delta(
    weight: torch.Tensor, positions: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The effective weight: a contiguous copy of ``weight`` with every delta added.

    The sum of an entry and its delta is taken in float32 (float64 for a float64 weight) and rounded once to
    the dtype of the weight, delta after delta, so that a delta which is small against its weight is not
    rounded before it is added.

    Args:
        weight: ``[out, in]`` (or ``[in, out]`` for Conv1D): positions index it as it lies, row-major.
        positions: per delta, flat indices ``[k]``, unique and ascending.
        values: per delta, ``[k]``.
    """
    effective = weight.clone(memory_format=torch.contiguous_format)
    flat = effective.view(-1)
    for where, delta in zip(positions, values, strict=True):
        wide = torch.promote_types(delta.dtype, torch.float32)
        if flat.dtype == wide and delta.dtype == wide:
            flat.index_add_(0, where, delta)
        else:
            flat[where] = (flat[where].to(wide) + delta).to(flat.dtype)
    return effective


def gather_delta(grad_weight: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Entries of a dense gradient at ``positions``: ``[k]`` in ``dtype``."""
    return grad_weight.reshape(-1).index_select(0, positions).to(dtype)
