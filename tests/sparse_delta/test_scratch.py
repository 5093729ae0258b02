"""The buffer is lent to one user at a time and does not outlive its owners."""

from __future__ import annotations

import gc
import threading

import torch

from dowser_peft.sparse_delta import scratch, sparse_delta_linear
from dowser_peft.sparse_delta.scratch import borrowed


def owner() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def address(shape: tuple[int, ...], dtype: torch.dtype, mask: torch.Tensor) -> int:
    with borrowed(shape, dtype, mask) as buffer:
        assert buffer.shape == shape and buffer.dtype == dtype and buffer.is_contiguous()
        return buffer.data_ptr()


def test_the_same_memory_serves_every_layer() -> None:
    mask, other = owner(), owner()
    first = address((30, 20), torch.float32, mask)
    assert address((30, 20), torch.float32, other) == first
    assert address((7, 3), torch.bfloat16, mask) == first
    address((300, 20), torch.float32, mask)  # grows
    grown = address((300, 20), torch.float32, mask)
    assert address((30, 20), torch.float32, mask) == grown


def test_nested_users_and_threads_have_memory_of_their_own() -> None:
    mask = owner()
    addresses: list[int] = []
    with borrowed((50, 50), torch.float32, mask) as outer:
        outer.fill_(1.0)
        with borrowed((50, 50), torch.float32, mask) as inner:
            inner.fill_(2.0)
            assert inner.data_ptr() != outer.data_ptr()
        thread = threading.Thread(target=lambda: addresses.append(address((50, 50), torch.float32, mask)))
        thread.start()
        thread.join()
        assert addresses[0] != outer.data_ptr()
        assert bool((outer == 1.0).all())


def test_released_with_the_last_owner() -> None:
    mask, other = owner(), owner()
    address((10, 10), torch.float32, mask)
    address((10, 10), torch.float32, other)
    del mask
    gc.collect()
    holder = scratch._thread.holder
    assert holder() is not None
    del other
    gc.collect()
    assert holder() is None


def test_given_back_after_an_error_and_usable_outside_inference_mode() -> None:
    mask = owner()
    with torch.inference_mode():
        first = address((10, 10), torch.float32, mask)
    try:
        with borrowed((10, 10), torch.float32, mask) as buffer:
            assert buffer.data_ptr() == first and not buffer.is_inference()
            raise KeyError
    except KeyError:
        assert address((10, 10), torch.float32, mask) == first


def test_outputs_and_gradients_are_not_in_the_buffer() -> None:
    weight, where = torch.randn(6, 5), torch.tensor([1, 7, 29], dtype=torch.int32)
    values, x = torch.randn(3, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    y = sparse_delta_linear(x, weight, None, [where], [values])
    y.sum().backward()
    kept = [t.detach().clone() for t in (y, x.grad, values.grad)]
    with borrowed((100, 100), torch.float32, where) as buffer:
        buffer.fill_(float("nan"))
    sparse_delta_linear(torch.full_like(x, float("nan")), weight, None, [where], [values])
    for tensor, expected in zip((y, x.grad, values.grad), kept, strict=True):
        assert torch.equal(tensor, expected)


def test_threads_compute_the_same_as_one() -> None:
    """Forward and backward of layers of different sizes at the same time."""
    sizes = [40, 90, 150, 60]
    cases = [(torch.randn(n, n), torch.arange(0, n * n, 7, dtype=torch.int32)) for n in sizes]

    def run(case: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        weight, where = case
        values = torch.ones(where.numel(), requires_grad=True)
        x = torch.ones(3, weight.shape[1], requires_grad=True)
        for _ in range(20):
            sparse_delta_linear(x, weight, None, [where], [values]).square().sum().backward()
        return torch.cat([x.grad.view(-1), values.grad])

    expected = [run(case) for case in cases]
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda index=index, case=case: results.setdefault(index, run(case)))
        for index, case in enumerate(cases)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(expected):
        assert torch.equal(results[i], result)
