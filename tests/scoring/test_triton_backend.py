"""The kernels against the torch backend: on a GPU if there is one, else in Triton's interpreter on small layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dowser_peft import bitmask, bottom_rho_mask
from dowser_peft.scoring import num_trainable

if sys.platform != "linux":
    pytest.skip("triton exists for Linux only", allow_module_level=True)

from dowser_peft.scoring import triton_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest sets the interpreter for "cpu"
SHAPES = [(1, 1023), (150, 7), (33, 65), (8, 8), (1, 1), (70, 136)]


def integers(shape: tuple[int, int], prompts: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores that float32 holds exactly in any order of summation, full of ties and zeros."""
    weight = torch.randint(-8, 9, shape)
    activation, sensitivity = torch.randint(0, 4, (prompts, shape[1])), torch.randint(0, 4, (prompts, shape[0]))
    return weight.float().to(DEVICE), activation.float().to(DEVICE), sensitivity.float().to(DEVICE)


def assert_equal_backends(
    weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float
) -> torch.Tensor:
    mask = bottom_rho_mask(weight, activation, sensitivity, rho, backend="triton")
    assert torch.equal(mask, bottom_rho_mask(weight, activation, sensitivity, rho, backend="torch"))
    assert bitmask.count(mask) == num_trainable(weight.numel(), rho)
    return mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [1e-9, 0.1, 1.0])
@pytest.mark.parametrize("prompts", [1, 3])
def test_exact_scores_with_ties(shape: tuple[int, int], rho: float, prompts: int) -> None:
    assert_equal_backends(*integers(shape, prompts), rho)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    weight, activation, sensitivity = integers((40, 70))
    assert_equal_backends(weight.to(dtype), activation, sensitivity, 0.3)
    assert_equal_backends(weight.to(dtype).T, sensitivity, activation, 0.3)  # a transposed view


def test_rounded_scores() -> None:
    """Where scores differ by more than rounding, the mask is that of the exact scores."""
    weight, activation, sensitivity = torch.randn(40, 64), torch.rand(16, 64), torch.rand(16, 40)
    mask = bottom_rho_mask(
        weight.to(DEVICE), activation.to(DEVICE), sensitivity.to(DEVICE), 0.2, backend="triton"
    ).cpu()
    chosen = bitmask.unpack(mask, weight.numel())
    score = (weight.double().abs() * (sensitivity.double().T @ activation.double())).view(-1)
    threshold = score.sort().values[num_trainable(weight.numel(), 0.2) - 1]
    apart = (score - threshold).abs() > 1e-5 * threshold
    assert torch.equal(chosen[apart], (score < threshold)[apart])


@pytest.mark.parametrize("kind", ["ordinary", "zeros", "equal"])
def test_from_a_sample(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search from the sample, and the full one, give one mask: that of the torch backend."""
    monkeypatch.setattr(triton_backend, "_SAMPLE", 1 << 11)
    weight, activation, sensitivity = integers((130, 64), prompts=1)
    if kind == "zeros":
        weight[torch.rand_like(weight) < 0.4] = 0.0
    elif kind == "equal":
        weight.fill_(2.0), activation.fill_(1.0), sensitivity.fill_(1.0)
    assert_equal_backends(weight, activation, sensitivity, 0.1)


def test_a_misleading_sample_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_SAMPLE", 1 << 11)
    monkeypatch.setattr(
        triton_backend, "sample_positions", lambda _, size, device: torch.zeros(size).long().to(device)
    )
    assert_equal_backends(torch.rand(130, 64, device=DEVICE), torch.ones(1, 64), torch.ones(1, 130), 0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_score_is_reported_with_its_row(bad: float) -> None:
    weight, activation, sensitivity = (tensor + 1 for tensor in integers((70, 16)))
    weight[66, 3] = bad
    with pytest.raises(ValueError, match="importance of row 66 holds a NaN, infinite or negative"):
        bottom_rho_mask(weight, activation, sensitivity, 0.1, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4099, 4093)])
def test_a_large_layer_on_a_gpu(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, device=DEVICE).bfloat16()
    activation, sensitivity = torch.rand(64, shape[1], device=DEVICE), torch.rand(64, shape[0], device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = bottom_rho_mask(weight, activation, sensitivity, 0.1, backend="triton")
    extra_bytes = torch.cuda.max_memory_allocated() - before - mask.numel()
    assert extra_bytes <= 16 << 20
    assert torch.equal(mask, bottom_rho_mask(weight, activation, sensitivity, 0.1, backend="triton"))
    expected = bottom_rho_mask(weight, activation, sensitivity, 0.1, backend="torch")
    assert bitmask.count(mask) == bitmask.count(expected) == num_trainable(weight.numel(), 0.1)
    assert bitmask.count(mask ^ expected) <= weight.numel() * 1e-5  # scores equal up to rounding


def test_the_kernels_run_on_the_device_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself launches on the current device, and the layers of one model may lie on several."""
    weight, activation, sensitivity = integers((33, 65))
    current: list[torch.device] = []
    found: list[list[torch.device]] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def run(self: object, sampled: torch.Tensor | None) -> torch.Tensor | None:
        found.append(list(current))
        return original(self, sampled)

    original = triton_backend._Selection.run
    monkeypatch.setattr(triton_backend, "_on", on)
    monkeypatch.setattr(triton_backend._Selection, "run", run)
    bottom_rho_mask(weight, activation, sensitivity, 0.1, backend="triton")
    assert found == [[weight.device]]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_layer_on_another_gpu_than_the_current_one() -> None:
    weight, activation, sensitivity = (tensor.to("cuda:1") for tensor in integers((300, 1000)))
    assert_equal_backends(weight, activation, sensitivity, 0.1)
