"""Effective weights that autograd does not keep from forward to backward, but builds again.

Whatever saves an effective weight, or a view of it, for its backward pass gets a note of which part it was. The
backward pass builds the weight again, once for all parts. So the memory is that of one layer at a time instead of a
second copy of all of them, for one more scatter a layer.

This is a pair of PyTorch's saved tensor hooks, of which only the innermost acts. Inside another pair (gradient
checkpointing, which drops everything and computes it again; offloading of activations) it therefore stands back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class _Rebuilt:
    """An effective weight that can be built again.

    Args:
        build: builds it.
        is_held: keep it from its first use to :meth:`release`; else it is built for each use.
    """

    def __init__(self, build: Callable[[], torch.Tensor], is_held: bool) -> None:
        self._build, self._is_held = build, is_held
        self._held: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        built = self._build() if self._held is None else self._held
        if self._is_held:
            self._held = built
        return built

    def release(self, gradient: torch.Tensor) -> None:
        """Called with the gradient of the whole weight: everybody has used their parts."""
        self._held = None


class _Part(NamedTuple):
    """Of which weight a saved tensor is a view, and where in it."""

    weight: _Rebuilt
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@contextmanager
def rebuilt_in_backward(
    weights: Sequence[torch.Tensor], builders: Sequence[Callable[[], torch.Tensor]]
) -> Iterator[None]:
    """What the block saves of ``weights`` for backward is built again there.

    Args:
        weights: results of :func:`dowser_peft.sparse_delta.sparse_delta_weight`.
        builders: per weight, builds it anew, bit for bit.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _inside_other_hooks():
        yield
        return
    rebuilt: dict[int, _Rebuilt] = {}
    for weight, build in zip(weights, builders, strict=True):
        part = rebuilt[weight.untyped_storage().data_ptr()] = _Rebuilt(build, weight.requires_grad)
        if weight.requires_grad:
            weight.register_hook(part.release)

    def pack(tensor: torch.Tensor) -> Any:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            return tensor
        owner = rebuilt.get(tensor.untyped_storage().data_ptr())
        return tensor if owner is None else _Part(owner, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(saved: Any) -> torch.Tensor:
        if not isinstance(saved, _Part):
            return saved
        with torch.no_grad():
            return saved.weight.get().as_strided(saved.size, saved.stride, saved.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _inside_other_hooks() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
