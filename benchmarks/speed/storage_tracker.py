"""Live bytes of a training step, by following every tensor storage from the operation that made it to its end.

A dispatch mode sees each operation's outputs. A storage that was not there before is counted until Python's weak
reference to it dies, which is when the allocator gets it back. It works on real tensors and, without any memory
or arithmetic, on the shape-only tensors of torch's ``FakeTensorMode``: that is how a step of a 405B model is
replayed in seconds. What an operation allocates and frees inside its kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATION, TEMPORARY = "activations", "temporary"


class StorageTracker(TorchDispatchMode):
    """Context manager: counts the bytes of the storages that are made under it.

    Attributes:
        live: bytes alive now, per label.
        peak: bytes alive, per label, at the moment when their sum was largest.
        largest: most bytes alive under each label, at whatever moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self._label = ACTIVATION
        self._followed: dict[int, weakref.ref[Any]] = {}

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Count storages made inside under ``name``."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    @property
    def live_bytes(self) -> int:
        return sum(self.live.values())

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        there_before = {_key(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if (key := _key(tensor)) not in there_before and key not in self._followed:
                self._follow(key, tensor.untyped_storage())
        return result

    def _follow(self, key: int, storage: torch.UntypedStorage) -> None:
        size, label = storage.nbytes(), self._label

        def ended(_: Any) -> None:
            self.live[label] -= size
            del self._followed[key]

        self._followed[key] = weakref.ref(storage, ended)
        self.live[label] += size
        self.largest[label] = max(self.largest[label], self.live[label])
        if self.live_bytes > self.peak_bytes:
            self.peak = self.live.copy()


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def profiled_peak_bytes(profile: torch.profiler.profile) -> int:
    """Largest sum of CPU allocations in a profile with ``profile_memory=True``: what kernels allocate included."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
