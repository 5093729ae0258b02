"""Forward and backward of the sparse delta as one autograd function.

    forward:    W_eff = W + scatter(values);   y = x W_eff^T + b;   W_eff is not kept
    backward:   W_eff rebuilt;   dx = dy W_eff;   dvalues = gather(dy^T x)

Trade-off: rebuilding costs one more pass over W, and saves a copy of W per layer from forward to backward.
What stays in memory besides the frozen base is the input x (which any trainable linear layer keeps), the
values, their gradients and optimizer states, and one layer's temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from dowser_peft.sparse_delta.torch_backend import gather_delta, scatter_delta


def sparse_delta_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Callable[[], torch.Tensor],
    bias: torch.Tensor | None,
    positions: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    fan_in_fan_out: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Linear layer with sparse deltas on its weight.

    Args:
        x: ``(..., in)``.
        weight: ``[out, in]``, or ``[in, out]`` with ``fan_in_fan_out``; or, for a quantised base, a function
            that dequantises it, called once in forward and once in backward.
        bias: ``[out]`` or None.
        positions: per delta, flat indices ``[k]`` into ``weight``.
        values: per delta, ``[k]``; these receive gradients.
        fan_in_fan_out: ``weight`` is stored transposed (transformers' Conv1D).
        compute_dtype: dtype of the matrix products (autocast); default: the dtype of the weight.

    Returns:
        ``(..., out)`` in the compute dtype.
    """
    # Two dimensions inside: a view that is made in an autograd function may not be modified in place.
    flat = x.reshape(-1, x.shape[-1])
    y = _SparseDeltaLinear.apply(flat, weight, bias, fan_in_fan_out, compute_dtype, tuple(positions), *values)
    return y.view(*x.shape[:-1], y.shape[-1])


class _SparseDeltaLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, fan_in_fan_out, compute_dtype, positions, *values):
        ctx.fan_in_fan_out, ctx.compute_dtype, ctx.positions = fan_in_fan_out, compute_dtype, positions
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.dequantise = weight if callable(weight) else None

        effective = _effective_weight(weight, positions, values, compute_dtype)
        x = x.to(effective.dtype)
        if bias is not None:
            bias = bias.to(effective.dtype)
        ctx.save_for_backward(x, None if ctx.dequantise else weight, *values)
        with torch.autocast(x.device.type, enabled=False):
            if not fan_in_fan_out:
                return F.linear(x, effective, bias)  # [tokens, in] @ [in, out]
            # addmm, as transformers' Conv1D does it: the same operation gives the same bits after a merge
            return torch.mm(x, effective) if bias is None else torch.addmm(bias, x, effective)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y):
        x, weight, *values = ctx.saved_tensors
        need_x, need_weight, need_bias, need_values = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            ctx.needs_input_grad[2],
            ctx.needs_input_grad[6:],
        )
        grad_x = grad_weight = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if need_x:
                effective = _effective_weight(ctx.dequantise or weight, ctx.positions, values, ctx.compute_dtype)
                grad_x = (grad_y @ (effective.T if ctx.fan_in_fan_out else effective)).to(ctx.x_dtype)  # [tokens, in]
                del effective  # before the dense gradient, so that only one of the two is alive
            if need_bias:
                grad_bias = grad_y.sum(0).to(ctx.bias_dtype)
            grad_values: list[torch.Tensor | None] = [None] * len(values)
            if need_weight or any(need_values):
                dense = x.T @ grad_y if ctx.fan_in_fan_out else grad_y.T @ x  # in the shape of the weight
                for index, needed in enumerate(need_values):
                    if needed:
                        grad_values[index] = gather_delta(dense, ctx.positions[index], values[index].dtype)
                if need_weight:
                    grad_weight = dense.to(weight.dtype)
        return (grad_x, grad_weight, grad_bias, None, None, None, *grad_values)


def _effective_weight(weight, positions, values, compute_dtype: torch.dtype | None) -> torch.Tensor:
    base = weight() if callable(weight) else weight
    effective = scatter_delta(base, positions, values)
    return effective if compute_dtype is None else effective.to(compute_dtype)
