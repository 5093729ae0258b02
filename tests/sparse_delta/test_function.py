"""The autograd function: gradcheck, agreement with plain autograd, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dowser_peft import bitmask
from dowser_peft.sparse_delta import scatter_delta, sparse_delta_linear, torch_backend
from tests.numerics import assert_no_worse_than_baseline


def case(out_features: int, in_features: int, k: int, dtype: torch.dtype = torch.float32, transposed: bool = False):
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    weight = torch.randn(shape, dtype=dtype)
    where = torch.randperm(weight.numel())[:k].sort().values.int()
    values = torch.randn(k, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return weight, where, values.requires_grad_()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features", "k"), [(3, 5, 4), (1, 7, 1), (4, 3, 12)])
def test_gradcheck(transposed: bool, with_bias: bool, out_features: int, in_features: int, k: int) -> None:
    weight, where, values = case(out_features, in_features, k, torch.float64, transposed)
    other = torch.randperm(weight.numel())[:2].sort().values.int()
    other_values = torch.randn(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out_features, dtype=torch.float64, requires_grad=True) if with_bias else None
    weight.requires_grad_()

    def function(x, weight, bias, values, other_values):
        return sparse_delta_linear(x, weight, bias, [where, other], [values, other_values], fan_in_fan_out=transposed)

    assert torch.autograd.gradcheck(function, (x, weight, bias, values, other_values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_shape", [(5,), (2, 7), (0, 4), (1, 1, 3)])
def test_matches_dense_autograd(dtype: torch.dtype, batch_shape: tuple[int, ...]) -> None:
    weight, where, values = case(33, 17, 60, dtype)
    x = torch.randn(*batch_shape, 17).to(dtype).requires_grad_()
    grad_y = torch.randn(*batch_shape, 33).to(dtype)

    def run(linear, cast: torch.dtype):
        x_, values_ = x.detach().to(cast).requires_grad_(), values.detach().clone().requires_grad_()
        y = linear(x_, values_)
        y.backward(grad_y.to(y.dtype))
        return y.detach(), x_.grad, values_.grad

    def dense(cast: torch.dtype):
        def linear(x_, values_):
            effective = scatter_delta(weight, [where], [values.detach()]).to(cast).requires_grad_()
            y = F.linear(x_, effective)
            effective.register_hook(lambda g: setattr(values_, "grad", g.reshape(-1)[where].float()))
            return y

        return run(linear, cast)

    result = run(lambda x_, values_: sparse_delta_linear(x_, weight, None, [where], [values_]), dtype)
    for got, baseline, truth in zip(result, dense(dtype), dense(torch.float64), strict=True):
        assert got.shape == truth.shape
        if truth.numel():
            assert_no_worse_than_baseline(got, baseline, truth, dtype)


def test_effective_weight_is_rounded_once() -> None:
    """A delta far smaller than the weight's spacing still counts, as soon as the exact sum rounds up."""
    weight = torch.ones(1, 4, dtype=torch.bfloat16)
    where, values = torch.tensor([2], dtype=torch.int32), torch.tensor([0.0040])  # half the spacing is 0.0039
    assert scatter_delta(weight, [where], [values]).tolist() == [[1.0, 1.0, 1.0078125, 1.0]]
    assert weight.tolist() == [[1.0, 1.0, 1.0, 1.0]]


def test_a_float64_weight_is_not_rounded_through_a_float32_delta() -> None:
    weight = torch.rand(4, 5, dtype=torch.float64) + 1
    values, positions = torch.rand(3), torch.tensor([0, 7, 19])
    expected = weight.clone()
    expected.view(-1)[positions] += values.double()
    assert torch.equal(scatter_delta(weight, [positions], [values]), expected)


def test_effective_weight_is_not_kept_for_backward() -> None:
    weight, where, values = case(40, 30, 100)
    x = torch.randn(6, 30, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = sparse_delta_linear(x, weight, None, [where], [values])
    kept = {t.data_ptr() for t in saved}
    assert kept <= {x.data_ptr(), weight.data_ptr(), values.data_ptr()}
    assert not hasattr(y.grad_fn, "effective")


def test_a_quantised_weight_is_read_once_in_forward_and_once_in_backward() -> None:
    weight, where, values = case(8, 6, 10)
    calls = []

    def dequantise() -> torch.Tensor:
        calls.append(1)
        return weight

    x = torch.randn(3, 6, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = sparse_delta_linear(x, dequantise, None, [where], [values])
    assert len(calls) == 1
    assert all(t.shape != weight.shape for t in saved)
    y.sum().backward()
    assert len(calls) == 2
    expected = torch.ones(3, 8) @ scatter_delta(weight, [where], [values.detach()])
    torch.testing.assert_close(x.grad, expected)


def test_no_gradient_of_the_input_skips_the_rebuild() -> None:
    weight, where, values = case(8, 6, 10)
    calls = []
    y = sparse_delta_linear(torch.randn(3, 6), lambda: calls.append(1) or weight, None, [where], [values])
    y.sum().backward()
    assert len(calls) == 1 and values.grad is not None


def test_overlapping_deltas_add_up() -> None:
    weight = torch.zeros(2, 3)
    first, second = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)
    effective = scatter_delta(weight, [first, second], [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])])
    assert effective.tolist() == [[1.0, 0.0, 0.0], [0.0, 12.0, 20.0]]


def test_non_contiguous_weight() -> None:
    weight = torch.randn(6, 4).T
    where = torch.tensor([0, 7, 23], dtype=torch.int32)
    effective = scatter_delta(weight, [where], [torch.ones(3)])
    expected = weight.contiguous().clone()
    expected.view(-1)[where.long()] += 1
    assert torch.equal(effective, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype(dtype: torch.dtype) -> None:
    weight, where, values = case(9, 5, 11)
    x = torch.randn(4, 5, requires_grad=True)
    y = sparse_delta_linear(x, weight, torch.randn(9), [where], [values], compute_dtype=dtype)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and values.grad.dtype == torch.float32


def test_the_output_may_be_modified_in_place() -> None:
    """Some models do, on a view of it."""
    weight, where, values = case(8, 6, 10)
    for x in (torch.randn(2, 3, 6), torch.randn(3, 6)):
        y = sparse_delta_linear(x, weight, None, [where], [values])
        y.transpose(0, -1).mul_(2.0)
        y.add_(1.0).sum().backward()
        expected = 2 * torch.ones(x[..., 0].numel(), 8).T @ x.reshape(-1, 6)
        torch.testing.assert_close(values.grad, expected.view(-1)[where])
        values.grad = None


def packed_case(*args, **kwargs):
    weight, where, values = case(*args, **kwargs)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[where.long()] = True
    return weight, where, bitmask.pack(mask), values


@pytest.mark.parametrize(
    ("out_features", "in_features", "k"), [(1, 1023, 1), (1025, 7, 700), (6, 5, 30), (64, 33, 211)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_mask_and_positions_and_blocks_agree(
    out_features: int, in_features: int, k: int, dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the values by blocks of rows, whatever their size, is that of the whole product."""
    weight, where, mask, values = packed_case(out_features, in_features, k, dtype, transposed)
    x, grad_y = torch.randn(9, in_features).to(dtype), torch.randn(9, out_features).to(dtype)
    dense = x.T @ grad_y if transposed else grad_y.T @ x
    monkeypatch.setattr(torch_backend, "_SAMPLED_SHARE", 0.0)
    for block in (1, 100, 1 << 22):
        monkeypatch.setattr(torch_backend, "_BLOCK_WEIGHTS", block)
        for at in (where, mask):
            y = sparse_delta_linear(x, weight, None, [at], [values], fan_in_fan_out=transposed)
            (gradient,) = torch.autograd.grad(y, values, grad_y)
            torch.testing.assert_close(gradient, dense.view(-1)[where].float())
    assert torch.equal(scatter_delta(weight, [mask], [values]), scatter_delta(weight, [where], [values]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "k"),
    [(300, 7, 5, 3), (9, 1, 1023, 1), (4, 33, 17, 0), (0, 33, 17, 60), (128, 3, 4, 12)],
)
def test_sampled_entries_are_those_of_the_dense_product(
    dtype: torch.dtype, index_dtype: torch.dtype, tokens: int, rows: int, columns: int, k: int
) -> None:
    left, right = torch.randn(tokens, rows, dtype=dtype), torch.randn(tokens, columns, dtype=dtype)
    where = torch.randperm(rows * columns)[:k].sort().values.to(index_dtype)
    sampled = torch_backend.sample_product(left, right, where)
    truth = (left.double().T @ right.double()).view(-1)[where]
    assert sampled.dtype == dtype
    if k and tokens:
        assert_no_worse_than_baseline(sampled, (left.T @ right).view(-1)[where], truth, dtype)
    else:
        assert torch.equal(sampled, truth.to(dtype))


def test_few_trained_weights_need_no_dense_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a fifth: entry by entry; more: the dense product, block by block."""
    calls: list[int] = []
    sample = torch_backend.sample_product
    monkeypatch.setattr(torch_backend, "sample_product", lambda *args: calls.append(1) or sample(*args))
    for k, expected in ((200, 1), (201, 0)):
        weight, where, values = case(40, 25, k)
        calls.clear()
        sparse_delta_linear(torch.randn(3, 25), weight, None, [where], [values]).sum().backward()
        assert len(calls) == expected


@pytest.mark.parametrize("deltas", [1, 2])
def test_autocast_rounds_to_the_weight_first(deltas: int) -> None:
    """As a merge into the float32 weight followed by autocast's conversion does."""
    weight, where, values = case(31, 17, 200)
    others = torch.randperm(weight.numel())[:200].sort().values.int(), torch.randn(200)
    positions, delta = [where, others[0]][:deltas], [values, others[1]][:deltas]
    x = torch.randn(5, 17)
    y = sparse_delta_linear(x, weight, None, positions, delta, compute_dtype=torch.bfloat16)
    merged = scatter_delta(weight, positions, delta)
    assert torch.equal(y, F.linear(x.bfloat16(), merged.bfloat16()))


def test_a_temporary_weight_is_overwritten_and_a_stored_one_is_not() -> None:
    weight, where, values = case(8, 6, 10)
    stored, x = weight.clone(), torch.randn(3, 6, requires_grad=True)
    expected = F.linear(x, scatter_delta(weight, [where], [values.detach()]))
    made: list[torch.Tensor] = []

    def dequantise() -> torch.Tensor:
        made.append(weight.clone())
        return made[-1]

    y = sparse_delta_linear(x, dequantise, None, [where], [values], weight_is_temporary=True)
    torch.testing.assert_close(y, expected)
    assert torch.equal(made[0], scatter_delta(weight, [where], [values.detach()]))
    y.sum().backward()
    sparse_delta_linear(x, lambda: weight, None, [where], [values]).sum().backward()
    assert torch.equal(weight, stored)


def test_an_empty_mask_adds_nothing_and_does_not_train() -> None:
    weight, _, values = case(8, 6, 10)
    empty, x = torch.zeros(6, dtype=torch.uint8), torch.randn(3, 6)
    y = sparse_delta_linear(x, weight, None, [empty], [values])
    assert torch.equal(y, F.linear(x, weight))
    with pytest.raises(RuntimeError, match="cannot train before its mask has been loaded"):
        y.sum().backward()


def test_a_mask_of_other_values_is_an_error() -> None:
    weight, _, mask, values = packed_case(8, 6, 10)
    with pytest.raises(RuntimeError, match="the mask marks 10 weights but there are 9 values"):
        scatter_delta(weight, [mask], [values.detach()[:9]])


def test_an_unknown_backend_is_an_error() -> None:
    weight, where, values = case(8, 6, 10)
    with pytest.raises(ValueError, match="backend must be one of .*'auto', 'torch', 'triton'.*, got 'cuda'"):
        scatter_delta(weight, [where], [values], backend="cuda")


def test_second_derivatives_and_functional_transforms_are_refused() -> None:
    weight, where, values = case(8, 6, 10)
    x = torch.randn(3, 6, requires_grad=True)
    y = sparse_delta_linear(x, weight, None, [where], [values])
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
        torch.func.grad(lambda v: sparse_delta_linear(x, weight, None, [where], [v]).sum())(values.detach())
