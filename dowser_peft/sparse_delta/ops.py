"""Effective weight and gather by mask or by positions, on either backend, as functions and as torch operators.

Eager code calls the functions. Compiled code sees the operators ``dowser::effective_weight`` and
``dowser::gather``, opaque to the compiler: the matrix products around them stay visible to it, and the index
that a mask needs is looked up at run time, so that a mask written later is never met by a stale index.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args

import torch

from dowser_peft.sparse_delta import torch_backend
from dowser_peft.sparse_delta.index import offsets_of, positions_of

Backend = Literal["auto", "torch", "triton"]
_NARROW = {torch.float32, torch.bfloat16, torch.float16}


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_mask(where: torch.Tensor) -> bool:
    """Whether ``where`` is a packed mask (uint8), not flat positions."""
    return where.dtype == torch.uint8


def takes_triton(backend: str, dense: torch.Tensor, where: Sequence[torch.Tensor], dtypes: set[torch.dtype]) -> bool:
    """Whether Triton serves a call: masks only, nothing wider than float32; "auto": on CUDA if it is installed.

    Raises:
        ValueError: if there is no such backend.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    able = all(map(is_mask, where)) and dtypes <= _NARROW
    return able and (backend == "triton" or (backend == "auto" and dense.is_cuda and _has_triton()))


def checked_positions(where: torch.Tensor, numel: int, size: int) -> torch.Tensor:
    """Flat positions ``[k]`` of ``where``, a packed mask or positions, for ``size`` values; empty for an empty mask.

    Raises:
        RuntimeError: if the mask marks another number of weights than there are values.
    """
    positions = positions_of(where, numel) if is_mask(where) else where
    if positions.numel() not in (0, size):
        raise RuntimeError(
            f"the mask marks {positions.numel()} weights but there are {size} values; "
            "they come from different adapters"
        )
    return positions


def trainable_positions(where: torch.Tensor, numel: int, size: int) -> torch.Tensor:
    """The same for a delta that trains: an empty mask is an error as well."""
    positions = checked_positions(where, numel, size)
    if positions.numel() != size:
        raise RuntimeError(f"no mask for {size} values: an adapter cannot train before its mask has been loaded")
    return positions


@torch.no_grad()
def effective_weight(
    weight: torch.Tensor,
    where: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    dtype: torch.dtype,
    backend: Backend = "auto",
    out: torch.Tensor | None = None,
    *,
    remember: bool = True,
) -> torch.Tensor:
    """``weight`` plus every delta, contiguous, in ``dtype``.

    Args:
        weight: ``[out, in]`` (or ``[in, out]`` for Conv1D), as it is stored; any strides.
        where: per delta, packed mask or flat positions ``[k]``, unique and ascending. An empty mask adds nothing.
        values: per delta, ``[k]``.
        dtype: of the result: sums are rounded to the dtype of ``weight`` first.
        backend: "torch", "triton", or "auto".
        out: contiguous tensor of ``dtype`` to write into, or ``weight`` itself; default: a new one.
        remember: keep what is derived from a mask on a GPU. Not in compiled code, whose memory may belong to a
            CUDA graph.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if takes_triton(backend, weight, where, {weight.dtype, dtype, *(delta.dtype for delta in values)}):
        from dowser_peft.sparse_delta import triton_backend

        offsets = [_offsets(mask, remember) for mask in where]
        return triton_backend.scatter_into(out, weight, where, offsets, values)
    positions = [checked_positions(at, weight.numel(), x.numel()) for at, x in zip(where, values, strict=True)]
    deltas = [(at, delta) for at, delta in zip(positions, values, strict=True) if at.numel()]
    if dtype == weight.dtype:
        return torch_backend.scatter_into(out, weight, *_columns(deltas))
    if len(deltas) == 1:
        return torch_backend.convert_and_scatter_into(out, weight, *deltas[0])
    # each sum is rounded to the dtype of the weight, which ``out`` cannot hold
    return out.copy_(torch_backend.scatter_into(torch.empty_like(out, dtype=weight.dtype), weight, *_columns(deltas)))


def gather(
    dense: torch.Tensor,
    where: torch.Tensor,
    size: int,
    dtype: torch.dtype,
    backend: Backend = "auto",
    *,
    remember: bool = True,
) -> torch.Tensor:
    """Entries of a dense gradient, in the shape of the weight, at the ``size`` places of ``where``: ``[size]``.

    Raises:
        RuntimeError: if the mask marks another number of weights, or none (it has not been loaded).
    """
    if takes_triton(backend, dense, [where], {dense.dtype, dtype}):
        from dowser_peft.sparse_delta import triton_backend

        return triton_backend.gather_delta(dense, where, _offsets(where, remember), size, dtype)
    return torch_backend.gather_delta(dense, trainable_positions(where, dense.numel(), size), dtype)


def _columns(deltas: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [where for where, _ in deltas], [delta for _, delta in deltas]


def _offsets(mask: torch.Tensor, remember: bool) -> torch.Tensor:
    from dowser_peft.sparse_delta.triton_backend import chunk_offsets

    # Derived inside a CUDA graph, they are derived at every replay, and follow the mask.
    if not remember or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return chunk_offsets(mask)
    return offsets_of(mask, chunk_offsets)


# ``after`` is not read. The backward pass gives the gradient that it works on: so the compiler neither merges
# its effective weight with that of the forward pass, nor moves it there and keeps it in memory in between.
@torch.library.custom_op(
    "dowser::effective_weight",
    mutates_args=(),
    schema="(Tensor weight, Tensor[] where, Tensor[] values, ScalarType dtype, str backend, Tensor? after) -> Tensor",
)
def effective_weight_op(weight, where, values, dtype, backend, after):
    return effective_weight(weight, where, values, dtype, backend, remember=not weight.is_cuda)


@effective_weight_op.register_fake
def _(weight, where, values, dtype, backend, after):
    return torch.empty(weight.shape, dtype=dtype, device=weight.device)


@torch.library.custom_op(
    "dowser::gather",
    mutates_args=(),
    schema="(Tensor dense, Tensor where, SymInt size, ScalarType dtype, str backend) -> Tensor",
)
def gather_op(dense, where, size, dtype, backend):
    return gather(dense, where, size, dtype, backend, remember=not dense.is_cuda)


@gather_op.register_fake
def _(dense, where, size, dtype, backend):
    return torch.empty(size, dtype=dtype, device=dense.device)
