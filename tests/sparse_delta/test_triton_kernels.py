"""The Triton kernels against torch, bit for bit: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from dowser_peft import bitmask
from dowser_peft.sparse_delta import scatter_delta, sparse_delta_linear
from dowser_peft.sparse_delta.ops import effective_weight, gather
from dowser_peft.sparse_delta.triton_backend import CHUNK, chunk_offsets
from tests.numerics import assert_no_worse_than_baseline

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1023), (1025, 7), (1, 1), (33, 250), (2, CHUNK)]


@pytest.fixture(autouse=True, scope="module")
def _hardware_rounding() -> Any:
    """A GPU rounds float32 to the nearest bfloat16, ties to even; the interpreter truncates."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(data, source, target, rounding):
        if (source, target) == (interpreter.tl.float32, interpreter.tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, rounding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", nearest)
        yield


def delta(numel: int, fraction: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed mask with at least one bit, and values of the size of a weight's spacing and larger."""
    mask = torch.rand(numel) < fraction
    mask[numel // 2] = True
    values = torch.randn(int(mask.sum())) * 10 ** torch.empty(int(mask.sum())).uniform_(-4, 0)
    return bitmask.pack(mask).to(DEVICE), values.to(DEVICE, dtype)


def matrix(shape: tuple[int, int], dtype: torch.dtype, contiguous: bool = True) -> torch.Tensor:
    weight = torch.randn(shape, dtype=dtype) if contiguous else torch.randn(shape[::-1], dtype=dtype).T
    return weight.to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_scatter_and_gather(shape: tuple[int, int], dtype: torch.dtype, contiguous: bool) -> None:
    weight = matrix(shape, dtype, contiguous)
    mask, values = delta(weight.numel(), 0.1)
    where = bitmask.positions(mask, weight.numel())
    result = scatter_delta(weight, [mask], [values], backend="triton")
    assert result.is_contiguous() and result.data_ptr() != weight.data_ptr()
    assert torch.equal(result, scatter_delta(weight, [where], [values], backend="torch"))
    for target in (torch.float32, dtype):
        found = gather(weight, mask, values.numel(), target, "triton")
        assert torch.equal(found, gather(weight, where, values.numel(), target, "torch"))


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_one_weight_and_all_weights(fraction: float) -> None:
    weight = matrix((65, 127), torch.bfloat16)
    mask, values = delta(weight.numel(), fraction)
    assert values.numel() in (1, weight.numel())
    expected = scatter_delta(weight, [mask], [values], backend="torch")
    assert torch.equal(scatter_delta(weight, [mask], [values], backend="triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_three_deltas_in_one_pass_round_after_each(dtype: torch.dtype, target: torch.dtype) -> None:
    weight = matrix((40, 61), dtype)
    value_dtypes = [torch.float32, torch.bfloat16, torch.float32]
    masks, values = zip(*(delta(weight.numel(), 0.5, value_dtype) for value_dtype in value_dtypes), strict=True)
    one_by_one = weight
    for mask, value in zip(masks, values, strict=True):
        one_by_one = scatter_delta(one_by_one, [mask], [value], backend="torch")
    for backend in ("torch", "triton"):
        assert torch.equal(effective_weight(weight, masks, values, target, backend), one_by_one.to(target))


def test_in_place() -> None:
    weight = matrix((9, 1001), torch.float16)
    mask, values = delta(weight.numel(), 0.2)
    expected = scatter_delta(weight, [mask], [values], backend="torch")
    effective_weight(weight, [mask], [values], weight.dtype, "triton", out=weight)
    assert torch.equal(weight, expected)


def test_offsets() -> None:
    for numel in (1, CHUNK, CHUNK + 1, 3 * CHUNK - 5):
        selected = torch.rand(numel) < 0.3
        starts = range(0, numel, CHUNK)
        expected = [int(selected[:start].sum()) for start in starts] + [int(selected.sum())]
        assert chunk_offsets(bitmask.pack(selected).to(DEVICE)).tolist() == expected


def test_a_mask_of_another_size_stays_in_bounds() -> None:
    """More bits than values: the rest is not read; fewer: the rest of the gradient is zero."""
    weight = matrix((8, 16), torch.float32)
    mask = bitmask.pack(torch.arange(128) < 20).to(DEVICE)
    memory = torch.full((30,), 100.0, device=DEVICE)
    result = scatter_delta(weight, [mask], [memory[:10]], backend="triton") - weight
    assert torch.equal((result.view(-1) > 50).nonzero().view(-1).cpu(), torch.arange(10))
    assert torch.equal(gather(weight, mask, 10, torch.float32, "triton"), weight.view(-1)[:10])
    found = gather(weight, mask, 25, torch.float32, "triton")
    assert torch.equal(found[:20], weight.view(-1)[:20]) and not found[20:].any()


def test_float64_and_positions_are_left_to_torch() -> None:
    weight = matrix((5, 9), torch.float64)
    mask, values = delta(45, 0.5)
    where = bitmask.positions(mask, 45)
    assert torch.equal(
        scatter_delta(weight, [mask], [values], backend="triton"), scatter_delta(weight, [where], [values])
    )
    single = weight.float()
    assert torch.equal(
        scatter_delta(single, [where], [values], backend="triton"), scatter_delta(single, [where], [values])
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_layer_is_no_worse_than_torch(dtype: torch.dtype, transposed: bool) -> None:
    weight = matrix((17, 33) if transposed else (33, 17), dtype)
    mask, values = delta(weight.numel(), 0.2)
    x, grad_y = torch.randn(2, 5, 17), torch.randn(2, 5, 33)

    def run(cast: torch.dtype, backend: Any) -> tuple[torch.Tensor, ...]:
        base, start = weight, values.clone()
        if cast == torch.float64:  # the effective weight is rounded to dtype, also in the truth
            base, start = scatter_delta(weight, [mask], [values]).double(), torch.zeros_like(values, dtype=cast)
        inputs = x.to(DEVICE, dtype).to(cast).detach().clone().requires_grad_(), start.requires_grad_()
        y = sparse_delta_linear(inputs[0], base, None, [mask], [inputs[1]], fan_in_fan_out=transposed, backend=backend)
        y.backward(grad_y.to(DEVICE, dtype).to(cast))
        return y.detach(), inputs[0].grad, inputs[1].grad

    for got, baseline, truth in zip(
        run(dtype, "triton"), run(dtype, "torch"), run(torch.float64, "torch"), strict=True
    ):
        assert got.dtype == baseline.dtype
        assert_no_worse_than_baseline(got, baseline, truth, dtype)
