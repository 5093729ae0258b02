"""What is derived from a packed mask: remembered while the mask lives and is not written, never saved.

    flat positions   int32 [k]          torch: 4 bytes per trained weight
    chunk offsets    int64 [chunks+1]   Triton: set bits before each chunk of weights, 8 bytes per 4096 weights

The memory is keyed by the mask tensor itself and its count of writes in place, so a stale index cannot be
read, whoever replaced or overwrote the mask. A tensor made in inference mode does not count writes: nothing
is remembered for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dowser_peft import bitmask


class _Derived(NamedTuple):
    version: int
    tensor: torch.Tensor


_positions = WeakTensorKeyDictionary()
_offsets = WeakTensorKeyDictionary()
_counts = WeakTensorKeyDictionary()


def positions_of(mask: torch.Tensor, numel: int) -> torch.Tensor:
    """Ascending flat indices ``[k]`` of the set bits of a packed mask of ``numel`` weights, on its device.

    Raises:
        ValueError: if the mask does not fit ``numel``.
    """
    return _remembered(_positions, mask, lambda: bitmask.positions(mask, numel))


def offsets_of(mask: torch.Tensor, derive: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Chunk offsets of a packed mask, by ``derive``."""
    return _remembered(_offsets, mask, lambda: derive(mask))


def marked(mask: torch.Tensor, numel: int) -> int:
    """Number of set bits. On a GPU, the first call for a mask waits for it.

    Raises:
        ValueError: if the mask does not fit ``numel``.
    """
    if mask.device.type == "cpu":
        return positions_of(mask, numel).numel()
    return int(_remembered(_counts, mask, lambda: torch.tensor(bitmask.count(mask))))


def _remembered(
    memory: WeakTensorKeyDictionary, mask: torch.Tensor, derive: Callable[[], torch.Tensor]
) -> torch.Tensor:
    if mask.is_inference():
        return derive()
    known = memory.get(mask)
    if known is not None and known.version == mask._version:
        return known.tensor
    version = mask._version
    with torch.inference_mode(False):  # it outlives this call, and may be needed for gradients later
        index = derive()
    memory[mask] = _Derived(version, index)
    return index
