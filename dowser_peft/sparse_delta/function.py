"""Forward and backward of the sparse delta as one autograd function.

    forward:    W_eff = W + scatter(values);   y = x W_eff^T + b;   W_eff is not kept
    backward:   W_eff rebuilt;   dx = dy W_eff;   dvalues = gather(dy^T x)

Trade-off: rebuilding costs one more pass over W, and saves a copy of W per layer from forward to backward.
What stays in memory besides the frozen base is the input x (which any trainable linear layer keeps), the
values, their gradients and optimizer states, and one layer's temporary. On a CPU that temporary is one buffer
for all layers, and of dy^T x only the trained entries are computed, or, where these are many, it exists a few rows
at a time.

A layer that computes with its weight in a way of its own (fused experts) takes the effective weight itself,
``sparse_delta_weight``: then autograd keeps it as it would keep any weight, unless ``rebuilt_in_backward`` is used.

Under torch.compile the same function is traced: the products stay visible to the compiler, scatter and gather
are operators (see ops.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dowser_peft.sparse_delta import ops, torch_backend
from dowser_peft.sparse_delta.ops import Backend
from dowser_peft.sparse_delta.scratch import borrowed

Weight = torch.Tensor | Callable[[], torch.Tensor]


def scatter_delta(
    weight: torch.Tensor,
    where: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The effective weight: a contiguous copy of ``weight`` with every delta added, each sum rounded once.

    Args:
        weight: ``[out, in]`` (or ``[in, out]`` for Conv1D): a delta indexes it as it lies, row-major.
        where: per delta, its packed mask, or flat positions ``[k]``, unique and ascending.
        values: per delta, ``[k]``.
        backend: "torch", "triton", or "auto": Triton on CUDA. Positions and float64 are left to torch.
    """
    return ops.effective_weight(weight, where, values, weight.dtype, backend)


def sparse_delta_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    where: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    fan_in_fan_out: bool = False,
    compute_dtype: torch.dtype | None = None,
    weight_is_temporary: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Linear layer with sparse deltas on its weight.

    Args:
        x: ``(..., in)``.
        weight: ``[out, in]``, or ``[in, out]`` with ``fan_in_fan_out``; or, for a quantised base, a function
            that dequantises it, called once in forward and once in backward.
        bias: ``[out]`` or None.
        where: per delta, its packed mask of the weights, or flat positions ``[k]``, unique and ascending.
        values: per delta, ``[k]``; these receive gradients.
        fan_in_fan_out: ``weight`` is stored transposed (transformers' Conv1D).
        compute_dtype: dtype of the matrix products (autocast); default: the dtype of the weight.
        weight_is_temporary: the function returns a new tensor each time, which may be overwritten.
        backend: of scatter and gather: "torch", "triton", or "auto": Triton on CUDA. Positions and float64 are
            left to torch.

    Returns:
        ``(..., out)`` in the compute dtype.
    """
    # Two dimensions inside: a view that is made in an autograd function may not be modified in place.
    flat = x.reshape(-1, x.shape[-1])
    y = _SparseDeltaLinear.apply(
        flat, weight, bias, fan_in_fan_out, compute_dtype, weight_is_temporary, backend, tuple(where), *values
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def sparse_delta_weight(
    weight: torch.Tensor,
    where: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """:func:`scatter_delta`, differentiable with respect to the values: ``dvalues = gather(dW_eff)``.

    Args:
        weight: ``[out, in]``, as it is stored.
        where: per delta, its packed mask, or flat positions ``[k]``, unique and ascending.
        values: per delta, ``[k]``; these receive gradients.
        backend: of scatter and gather, as of :func:`sparse_delta_linear`.
    """
    return _SparseDeltaWeight.apply(weight, backend, tuple(where), *values)


class _SparseDeltaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight, backend, where, *values):
        ctx.backend, ctx.where = backend, where
        ctx.save_for_backward(*values)
        if torch.compiler.is_compiling():
            return ops.effective_weight_op(weight, where, values, weight.dtype, backend, None)
        return ops.effective_weight(weight, where, values, weight.dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight):
        grad_values = [
            _gather(grad_weight, where, delta, ctx.backend) if needed else None
            for where, delta, needed in zip(ctx.where, ctx.saved_tensors, ctx.needs_input_grad[3:], strict=True)
        ]
        return (grad_weight if ctx.needs_input_grad[0] else None, None, None, *grad_values)


class _SparseDeltaLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, bias, fan_in_fan_out, compute_dtype, weight_is_temporary, backend, where, *values
    ):
        ctx.fan_in_fan_out, ctx.compute_dtype, ctx.backend, ctx.where = fan_in_fan_out, compute_dtype, backend, where
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.dequantise, ctx.weight_is_temporary = weight if callable(weight) else None, weight_is_temporary

        base = weight() if callable(weight) else weight
        dtype = base.dtype if compute_dtype is None else compute_dtype
        x = x.to(dtype)
        if bias is not None:
            bias = bias.to(dtype)
        ctx.save_for_backward(x, None if ctx.dequantise else weight, *values)
        with torch.autocast(x.device.type, enabled=False):
            if torch.compiler.is_compiling():
                effective = ops.effective_weight_op(base, where, values, dtype, backend, None)
                return _product(x, effective, bias, fan_in_fan_out)
            with _effective_weight(base, where, values, dtype, weight_is_temporary, backend) as effective:
                return _product(x, effective, bias, fan_in_fan_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y):
        x, weight, *values = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_values = ctx.needs_input_grad[8:]
        grad_x = grad_weight = grad_bias = None
        grad_values: list[torch.Tensor | None] = [None] * len(values)
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                grad_x = _input_gradient(ctx, grad_y, weight, values).to(ctx.x_dtype)
            if need_bias:
                grad_bias = grad_y.sum(0).to(ctx.bias_dtype)
            left, right = (x, grad_y) if ctx.fan_in_fan_out else (grad_y, x)
            needed = [index for index, need in enumerate(need_values) if need]
            if need_weight or not _by_blocks(ctx, x, values):
                if need_weight or needed:
                    dense = left.T @ right  # in the shape of the weight
                    for index in needed:
                        grad_values[index] = _gather(dense, ctx.where[index], values[index], ctx.backend)
                    if need_weight:
                        grad_weight = dense.to(weight.dtype)
            elif needed:
                found = _gather_by_blocks(left, right, [(ctx.where[index], values[index]) for index in needed])
                for index, gradient in zip(needed, found, strict=True):
                    grad_values[index] = gradient
        return (grad_x, grad_weight, grad_bias, None, None, None, None, None, *grad_values)


def _product(x: torch.Tensor, effective: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
    if not transposed:
        return F.linear(x, effective, bias)  # [tokens, in] @ [in, out]
    # addmm, as transformers' Conv1D does it: the same operation gives the same bits after a merge
    return torch.mm(x, effective) if bias is None else torch.addmm(bias, x, effective)


def _input_gradient(ctx: Any, grad_y: torch.Tensor, weight: torch.Tensor | None, values) -> torch.Tensor:
    base: Any = weight if ctx.dequantise is None else ctx.dequantise()
    dtype = base.dtype if ctx.compute_dtype is None else ctx.compute_dtype
    if torch.compiler.is_compiling():
        effective = ops.effective_weight_op(base, ctx.where, values, dtype, ctx.backend, grad_y)
        return grad_y @ (effective.T if ctx.fan_in_fan_out else effective)
    with _effective_weight(base, ctx.where, values, dtype, ctx.weight_is_temporary, ctx.backend) as effective:
        return grad_y @ (effective.T if ctx.fan_in_fan_out else effective)  # [tokens, out] @ [out, in]


@contextmanager
def _effective_weight(
    base: torch.Tensor,
    where: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    dtype: torch.dtype,
    is_temporary: bool,
    backend: Backend,
) -> Iterator[torch.Tensor]:
    """The effective weight while the block runs, in the memory of ``base`` or in borrowed memory where possible."""
    if is_temporary and base.dtype == dtype and base.is_contiguous():
        yield ops.effective_weight(base, where, values, dtype, backend, out=base)
    elif where and _is_plain_cpu(base):
        with borrowed(base.shape, dtype, owner=where[0]) as out:
            yield ops.effective_weight(base, where, values, dtype, backend, out=out)
    else:
        yield ops.effective_weight(base, where, values, dtype, backend)


def _is_plain_cpu(tensor: torch.Tensor) -> bool:
    """Not a subclass, which may only stand for memory (a fake tensor)."""
    return tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _by_blocks(ctx: Any, x: torch.Tensor, values: Sequence[torch.Tensor]) -> bool:
    """Whether the dense gradient need not exist as a whole."""
    if torch.compiler.is_compiling() or not _is_plain_cpu(x):
        return False
    return not ops.takes_triton(ctx.backend, x, ctx.where, {x.dtype, *(delta.dtype for delta in values)})


def _gather(dense: torch.Tensor, where: torch.Tensor, values: torch.Tensor, backend: Backend) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return ops.gather_op(dense, where, values.numel(), values.dtype, backend)
    return ops.gather(dense, where, values.numel(), values.dtype, backend)


def _gather_by_blocks(
    left: torch.Tensor, right: torch.Tensor, deltas: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    rows, columns = left.shape[1], right.shape[1]
    positions = [ops.trainable_positions(where, rows * columns, values.numel()) for where, values in deltas]
    if torch_backend.is_sampled(positions, left, right):
        found = [torch_backend.sample_product(left, right, where) for where in positions]
        return [gradient.to(values.dtype) for gradient, (_, values) in zip(found, deltas, strict=True)]
    with borrowed(torch_backend.block_shape(rows, columns), left.dtype, owner=deltas[0][0]) as block:
        return torch_backend.gather_product(left, right, positions, [values.dtype for _, values in deltas], block)
