"""Selection of columns: against a sort of the full scores, ties, every layout, bounded memory."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from dowser_peft.scoring import columns as module
from dowser_peft.scoring import num_trainable
from dowser_peft.scoring.columns import bottom_rho_columns


def factors(out_features: int, in_features: int, prompts: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, activation = torch.randn(out_features, in_features), torch.rand(prompts, in_features)
    return weight, activation, torch.rand(prompts, out_features)


def exact(weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float) -> list[int]:
    """By the definition S_j = sum_i |W_ij| sum_n psi_ni a_nj, in rational numbers."""
    W, A, Psi = ([[Fraction(x) for x in row] for row in m.tolist()] for m in (weight, activation, sensitivity))
    score = [
        sum(abs(W[i][j]) * sum(p[i] * a[j] for p, a in zip(Psi, A, strict=True)) for i in range(len(W)))
        for j in range(len(W[0]))
    ]
    order = sorted(range(len(score)), key=lambda j: (score[j], j))
    return sorted(order[: num_trainable(len(score), rho)])


@pytest.mark.parametrize(("out_features", "in_features"), [(12, 10), (1, 31), (31, 1), (7, 7), (3, 64)])
@pytest.mark.parametrize("rho", [1e-6, 0.1, 0.5, 1.0])
def test_by_definition(out_features: int, in_features: int, rho: float) -> None:
    case = factors(out_features, in_features)
    found = bottom_rho_columns(*case, rho)
    assert found.dtype == torch.int32
    assert found.tolist() == exact(*case, rho)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight, activation, sensitivity = factors(20, 33)
    weight = weight.to(dtype)
    found = bottom_rho_columns(weight, activation.bfloat16(), sensitivity.bfloat16(), 0.3)
    expected = exact(weight.double(), activation.bfloat16().double(), sensitivity.bfloat16().double(), 0.3)
    assert found.tolist() == expected


def test_ties_go_to_the_lower_id() -> None:
    ones = torch.ones(1, 100), torch.ones(1, 33)
    assert bottom_rho_columns(torch.ones(33, 100), *ones, 0.25).tolist() == list(range(25))
    weight = torch.randn(33, 1).expand(33, 100) * torch.where(torch.arange(100) % 2 == 0, 2.0, -1.0)
    assert bottom_rho_columns(weight, *ones, 0.25).tolist() == list(range(1, 50, 2))


def test_blocks_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    case = factors(70, 40)
    whole = bottom_rho_columns(*case, 0.4)
    for block in (1, 40, 130, 1000):
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block)
        assert torch.equal(bottom_rho_columns(*case, 0.4), whole)


def test_a_small_difference_between_large_sums_counts() -> None:
    """Two columns of 4096 weights whose sums differ by one part in 4e7: beyond float32, not beyond float64."""
    weight = torch.rand(4096, 2, generator=torch.Generator().manual_seed(0)) + 1
    weight[:, 1] = weight[:, 0].flip(0)
    weight[7, 0] = 1.0
    weight[4096 - 8, 1] = 1.0 - 2**-13
    assert bottom_rho_columns(weight, torch.ones(1, 2), torch.ones(1, 4096), 0.5).tolist() == [1]


def test_a_transposed_view_is_the_same_matrix() -> None:
    weight, activation, sensitivity = factors(18, 25)
    stored = weight.T.contiguous()
    expected = bottom_rho_columns(weight, activation, sensitivity, 0.2)
    assert torch.equal(bottom_rho_columns(stored.T, activation, sensitivity, 0.2), expected)


def test_memory_does_not_grow_with_the_number_of_rows() -> None:
    """No tensor as large as the weight is made."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                shares = any(isinstance(a, torch.Tensor) and a.data_ptr() == result.data_ptr() for a in args)
                sizes.append(0 if shares else result.numel() * result.element_size())
            return result

    weight, activation, sensitivity = factors(4096, 1024)
    with Watch():
        bottom_rho_columns(weight, activation, sensitivity, 0.1)
    assert 0 < max(sizes) <= 8 << 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_not_finite(bad: float, which: int) -> None:
    case = factors(5, 6)
    case[which].view(-1)[3] = bad
    with pytest.raises(ValueError, match="importance of its columns holds a NaN, infinite or negative"):
        bottom_rho_columns(*case, 0.5)


@pytest.mark.parametrize(("rho", "message"), [(0.0, "rho must be in"), (1.5, "rho must be in"), (0.5, "activation")])
def test_bad_arguments(rho: float, message: str) -> None:
    weight, activation, sensitivity = factors(5, 6)
    with pytest.raises(ValueError, match=message):
        bottom_rho_columns(weight, activation[:, 1:], sensitivity, rho)
