"""``y + x[..., c] V^T``: value and gradients against a dense layer, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dowser_peft.column_delta import add_column_delta
from tests.numerics import assert_no_worse_than_baseline


def case(
    out_features: int, in_features: int, k: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, ids and values; values in float32 over a half precision weight, as in training."""
    weight = torch.randn(out_features, in_features, dtype=torch.float64).to(dtype)
    columns = torch.randperm(in_features)[:k].sort().values.int()
    values = 0.1 * torch.randn(out_features, k, dtype=torch.promote_types(dtype, torch.float32))
    return weight, columns, values.requires_grad_()


@pytest.mark.parametrize(("out_features", "in_features", "k"), [(3, 5, 2), (4, 1, 1), (1, 7, 7), (3, 6, 1)])
def test_gradcheck(out_features: int, in_features: int, k: int) -> None:
    weight, columns, values = case(out_features, in_features, k, torch.float64)
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)

    def function(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return add_column_delta(F.linear(x, weight), x, columns, values)

    assert torch.autograd.gradcheck(function, (x, values))
    assert torch.autograd.gradgradcheck(function, (x, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_shape", [(5,), (2, 7), (0, 4), (1, 2, 3), ()])
@pytest.mark.parametrize(("out_features", "in_features", "k"), [(33, 17, 4), (5, 1, 1), (8, 1023, 102), (7, 9, 9)])
def test_matches_dense_autograd(
    dtype: torch.dtype, batch_shape: tuple[int, ...], out_features: int, in_features: int, k: int
) -> None:
    weight, columns, values = case(out_features, in_features, k, dtype)
    x = torch.randn(*batch_shape, in_features).to(dtype)
    grad_y = torch.randn(*batch_shape, out_features).to(dtype)

    def run(cast: torch.dtype, dense: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_, values_, weight_ = x.to(cast).requires_grad_(), values.detach().clone().requires_grad_(), weight.to(cast)
        if dense:
            delta = torch.zeros(weight.shape, dtype=values.dtype).index_copy(1, columns.long(), values_)
            y = F.linear(x_, (weight.to(delta.dtype) + delta).to(cast))
        else:
            y = add_column_delta(F.linear(x_, weight_), x_, columns, values_)
        assert y.dtype == cast
        y.backward(grad_y.to(cast))
        return y.detach(), x_.grad, values_.grad

    with torch.no_grad():  # the truth knows no rounding of W + V
        exact = weight.double().index_add(1, columns, values.double())
    truth = F.linear(x.double(), exact), grad_y.double() @ exact, None
    rows = (grad_y.double().reshape(-1, out_features), x.double().reshape(-1, in_features))
    truth = (*truth[:2], (rows[0].T @ rows[1])[:, columns.long()])
    for got, baseline, exactly in zip(run(dtype, dense=False), run(dtype, dense=True), truth, strict=True):
        assert got.shape == exactly.shape
        if exactly.numel():
            assert_no_worse_than_baseline(got, baseline, exactly, dtype)


def test_non_contiguous_input_and_output() -> None:
    weight, columns, values = case(6, 5, 2)
    x = torch.randn(5, 4, 3).transpose(0, 2)  # [3, 4, 5]
    y = torch.randn(6, 4, 3).transpose(0, 2)
    expected = y + x[..., columns.long()] @ values.T
    torch.testing.assert_close(add_column_delta(y, x, columns, values), expected)


def test_kept_for_backward_are_the_columns_of_the_input_and_the_values() -> None:
    """In a half precision layer too: no copy of the values in its dtype, nothing in the size of x or W."""
    weight, columns, values = case(40, 30, 3, torch.bfloat16)
    x = torch.randn(6, 30, dtype=torch.bfloat16, requires_grad=True)
    y = F.linear(x, weight)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_column_delta(y, x, columns, values)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    others = {pointer: size for pointer, size in storages.items() if pointer != values.untyped_storage().data_ptr()}
    assert len(others) < len(storages)
    assert sorted(others.values()) == sorted([6 * 3 * 2, 3 * 8])  # x_c in bfloat16, and the ids in int64


def test_a_base_that_answers_in_another_dtype() -> None:
    _, columns, values = case(6, 5, 2)
    x, y = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True), torch.randn(3, 6)
    result = add_column_delta(y, x, columns, values)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, y + x[:, columns.long()].float() @ values.T)
    result.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and values.grad.dtype == torch.float32


def test_the_output_may_be_modified_in_place() -> None:
    weight, columns, values = case(8, 6, 2)
    for x in (torch.randn(2, 3, 6), torch.randn(3, 6)):
        y = add_column_delta(F.linear(x, weight), x, columns, values)
        y.transpose(0, -1).mul_(2.0)
        y.add_(1.0).sum().backward()
        expected = 2 * x[..., columns.long()].reshape(-1, 2).sum(0).expand(8, 2)
        torch.testing.assert_close(values.grad, expected)
        values.grad = None
