"""The selection against brute force: sort all scores, count, and compare the masks bit by bit."""

from __future__ import annotations

import pytest
import torch

from dowser_peft import bitmask, bottom_rho_mask
from dowser_peft.scoring import blocks, num_trainable, reference, torch_backend

SHAPES = [(1, 1023), (1025, 7), (33, 65), (8, 8), (1, 1), (64, 256)]


def brute_force_mask(
    weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, k: int
) -> torch.Tensor:
    """A stable sort keeps equal scores in the order of their flat index."""
    score = weight.abs().float() * (sensitivity.float().T @ activation.float())
    order = score.view(-1).sort(stable=True).indices
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:k]] = True
    return mask


def factors(shape: tuple[int, int], prompts: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(prompts, shape[1]), torch.rand(prompts, shape[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [1e-9, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_brute_force(shape: tuple[int, int], rho: float, dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    activation, sensitivity = factors(shape)
    k = num_trainable(weight.numel(), rho)
    mask = bitmask.unpack(bottom_rho_mask(weight, activation, sensitivity, rho), weight.numel())
    assert int(mask.sum()) == k == max(1, round(rho * weight.numel()))
    assert torch.equal(mask, brute_force_mask(weight, activation, sensitivity, k))


def test_ties_go_to_the_lower_flat_index_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 64)
    weight = torch.randint(-2, 3, (40, 13)).float()  # many ties, many zeros
    activation, sensitivity = torch.ones(1, 13), torch.ones(1, 40)
    for k in (1, 17, 260, 519, 520):
        mask = bitmask.unpack(torch_backend.bottom_k_mask(weight, activation, sensitivity, k), 520)
        assert torch.equal(mask, brute_force_mask(weight, activation, sensitivity, k))


def test_result_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 30)
    activation, sensitivity = factors((100, 30), prompts=1)
    whole = bottom_rho_mask(weight, activation, sensitivity, 0.3)
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 8 * 30)
    assert torch.equal(bottom_rho_mask(weight, activation, sensitivity, 0.3), whole)


def test_the_score_matrix_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 8 * 16)
    sizes = [score.numel() for _, score in blocks.score_blocks(torch.randn(64, 16), *factors((64, 16)))]
    assert sizes == [8 * 16] * 8


def test_non_contiguous_weight() -> None:
    weight = torch.randn(20, 31).T
    activation, sensitivity = factors((31, 20))
    assert torch.equal(
        bottom_rho_mask(weight, activation, sensitivity, 0.2),
        bottom_rho_mask(weight.contiguous(), activation, sensitivity, 0.2),
    )


def test_all_zero_scores_select_the_first_weights() -> None:
    mask = bottom_rho_mask(torch.zeros(4, 8), torch.ones(1, 8), torch.ones(1, 4), 0.25)
    assert mask.tolist() == [255, 0, 0, 0]


@pytest.mark.parametrize("rho", [0.0, -0.1, 1.5, float("nan")])
def test_rho_outside_the_unit_interval(rho: float) -> None:
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\]"):
        bottom_rho_mask(torch.ones(2, 2), torch.ones(1, 2), torch.ones(1, 2), rho)


@pytest.mark.parametrize(
    ("weight", "activation", "sensitivity", "message"),
    [
        (torch.ones(4), torch.ones(1, 4), torch.ones(1, 1), "must be a matrix"),
        (torch.ones(2, 3), torch.ones(1, 2), torch.ones(1, 2), r"activation must be \[N, 3\], got \(1, 2\)"),
        (torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 3), r"sensitivity must be \[N, 2\], got \(1, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(1, 2), "activation has 2 prompts but sensitivity has 1"),
        (torch.full((2, 3), float("nan")), torch.ones(1, 3), torch.ones(1, 2), "NaN, infinite or negative"),
        (torch.ones(2, 3), torch.full((1, 3), float("inf")), torch.ones(1, 2), "NaN, infinite or negative"),
    ],
)
def test_bad_input(weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bottom_rho_mask(weight, activation, sensitivity, 0.5)


@pytest.mark.parametrize("shape", [(300, 257), (260, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rho", [1e-9, 0.1, 0.5, 0.999, 1.0])
def test_one_pass_equals_the_reference_and_brute_force(
    shape: tuple[int, int], dtype: torch.dtype, rho: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large enough to be sampled, in many blocks; the reference must not be needed."""
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", 1 << 13)
    weight = torch.randn(shape).to(dtype)
    activation, sensitivity = torch.rand(4, shape[1]), torch.randn(4, shape[0]).exp()
    k = num_trainable(weight.numel(), rho)
    expected = reference.bottom_k_mask(weight, activation, sensitivity, k)
    monkeypatch.setattr(reference, "bottom_k_mask", None)
    mask = bottom_rho_mask(weight, activation, sensitivity, rho)
    assert torch.equal(mask, expected) and bitmask.count(mask) == k


@pytest.mark.parametrize("interval", [(0.0, 1e-30), (1e30, 2e30), None])
def test_a_wrong_interval_is_noticed(interval: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 33)
    activation, sensitivity = factors((70, 33))
    expected = bottom_rho_mask(weight, activation, sensitivity, 0.3)
    monkeypatch.setattr(torch_backend, "_interval", lambda *_: interval)
    assert torch.equal(bottom_rho_mask(weight, activation, sensitivity, 0.3), expected)


def crowded(kind: str) -> torch.Tensor:
    weight = torch.randn(300, 256)
    if kind == "zeros":
        weight[torch.rand(300, 256) < 0.4] = 0.0
    elif kind == "equal":
        weight.fill_(0.5)
    elif kind == "last rows low":
        weight[-60:] *= 1e-4
    return weight


@pytest.mark.parametrize("kind", ["zeros", "equal", "last rows low"])
@pytest.mark.parametrize("most", [1 << 20, 1000])
def test_crowded_scores(kind: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties beyond the budget of candidates send the layer to the reference; the mask stays the same."""
    monkeypatch.setattr(torch_backend, "_MAX_CANDIDATES", most)
    weight = crowded(kind)
    activation, sensitivity = torch.ones(1, 256), torch.ones(1, 300)
    k = num_trainable(weight.numel(), 0.1)
    mask = bitmask.unpack(bottom_rho_mask(weight, activation, sensitivity, 0.1), weight.numel())
    assert torch.equal(mask, brute_force_mask(weight, activation, sensitivity, k))


def test_the_message_names_the_rows() -> None:
    weight, sensitivity = torch.ones(20, 8), torch.ones(2, 20)
    sensitivity[1, 13] = -1.0
    with pytest.raises(ValueError, match="importance of row 13 holds a NaN, infinite or negative"):
        bottom_rho_mask(weight, torch.ones(2, 8), sensitivity, 0.5)
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"importance of rows 0\.\.19 holds"):
        bottom_rho_mask(weight, torch.ones(2, 8), torch.ones(2, 20), 0.5)


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch' or 'triton', got 'cuda'"):
        bottom_rho_mask(torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 2), 0.5, backend="cuda")


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs the weight on a CUDA device, not on cpu"):
        bottom_rho_mask(torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 2), 0.5, backend="triton")
