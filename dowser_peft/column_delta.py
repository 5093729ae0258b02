"""The delta of whole input columns: ``y = base(x) + x[..., c] V^T``.

    forward:    x_c = x[..., c];   y = y_base + x_c V^T
    backward:   dV = dy^T x_c;   dx_c = dy V, scattered into dx

Nothing of the base layer is read, and neither an effective weight nor a dense gradient of one exists. Kept for
backward besides the parameter V are x_c, which is the fraction rho of x, and the ids.
"""

from __future__ import annotations

from typing import Any

import torch


def add_column_delta(y: torch.Tensor, x: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Add the delta of some input columns to the output of a linear layer.

    The product is taken in the dtype of ``y``, as the layer takes its own; float32 values over a bfloat16 base
    are rounded for it, but accumulate updates in float32.

    Args:
        y: output of the layer, ``(..., out)``.
        x: its input, ``(..., in)``.
        columns: ids ``[k]`` of the columns, int32, each once.
        values: ``V``, ``[out, k]``.

    Returns:
        ``(..., out)`` in the dtype of ``y``.
    """
    x_c = _TakeColumns.apply(x, columns.long().expand(*x.shape[:-1], -1)).to(y.dtype)
    flat = _AddProduct.apply(y.reshape(-1, y.shape[-1]), x_c.reshape(-1, x_c.shape[-1]), values)
    return flat.view(y.shape)


class _TakeColumns(torch.autograd.Function):
    """``x[..., c]``, with the ids expanded to its shape.

    torch's own ``gather`` would keep all of x for backward. ``index_select`` would not, but its backward,
    ``index_add``, takes 10 times longer on a CPU, and on a GPU adds atomically what here, ids being unique, is
    stored.
    """

    @staticmethod
    def forward(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.gather(-1, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x, index = inputs
        ctx.save_for_backward(index)
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (grad,), (index,) = grads, ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_(-1, index, grad), None


class _AddProduct(torch.autograd.Function):
    """``y + x V^T`` for ``y`` [tokens, out], ``x`` [tokens, k], ``V`` [out, k] in any float dtype.

    Plain autograd would keep V in the dtype of the product from forward to backward: as much as the trained
    part of the weight. Here it is rounded again.
    """

    @staticmethod
    def forward(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return torch.addmm(y, x, values.to(x.dtype).T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        _, x, values = inputs
        ctx.save_for_backward(x, values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        (grad,) = grads
        x, values = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = grad @ values.to(grad.dtype) if ctx.needs_input_grad[1] else None
            grad_values = (grad.T @ x).to(values.dtype) if ctx.needs_input_grad[2] else None
        return grad, grad_x, grad_values
