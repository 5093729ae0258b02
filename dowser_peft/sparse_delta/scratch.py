"""A buffer for the effective weight that is used again from layer to layer, on a CPU.

Fresh memory of more than 32 MB comes page by page from the kernel, which clears it: a 67 MB clone took 93 ms,
the same copy into memory that is already mapped 3 ms, and a 4096 x 4096 matrix product with 512 tokens 110 ms
(2 cores of an EPYC). So each thread keeps one buffer, as large as the largest weight it served.

It is lent to one user at a time and never leaves this package. It lives as long as one of the tensors it was
borrowed for: a thread holds it weakly, the owners hold it strongly.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class _Holder:
    """The buffer of one thread; None while it is lent."""

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None


_thread = threading.local()
_keepers = WeakTensorKeyDictionary()  # owner -> holder


@contextmanager
def borrowed(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, owner: torch.Tensor) -> Iterator[torch.Tensor]:
    """An uninitialised contiguous CPU tensor, the user's own until the block ends.

    Args:
        shape: its shape.
        dtype: its dtype.
        owner: a tensor whose life the memory shares (the mask of the adapter that it is borrowed for).
    """
    reference = getattr(_thread, "holder", None)
    holder = None if reference is None else reference()
    if holder is None:
        holder = _Holder()
        _thread.holder = weakref.ref(holder)
    if _keepers.get(owner) is not holder:
        _keepers[owner] = holder

    size = math.prod(shape) * dtype.itemsize
    buffer, holder.buffer = holder.buffer, None  # a nested user finds none and gets memory of its own
    if buffer is None or buffer.numel() < size:
        del buffer
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            buffer = torch.empty(size, dtype=torch.uint8)
    try:
        yield buffer[:size].view(dtype).view(shape)
    finally:
        is_real = type(buffer) is torch.Tensor  # not one that only stands for memory
        if is_real and (holder.buffer is None or holder.buffer.numel() < buffer.numel()):
            holder.buffer = buffer


def release() -> None:
    """Give back the buffer of this thread; the next user allocates it anew."""
    reference = getattr(_thread, "holder", None)
    holder = None if reference is None else reference()
    if holder is not None:
        holder.buffer = None
