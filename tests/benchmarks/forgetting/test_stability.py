from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.forgetting import stability
from dowser_peft import probe
from tests.models import tiny_llama


def test_spearman_is_scipys():
    first, second = torch.randn(13, 7), torch.randn(13, 7)
    expected = spearmanr(first.reshape(-1), (first + second).reshape(-1)).statistic
    assert stability.spearman(first, first + second) == pytest.approx(expected)
    assert stability.spearman(first, -(first**3)) == pytest.approx(-1.0)


def test_hamming_by_hand():
    """Of five weights one trains: masks with different ones differ in two bits."""
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    assert stability.hamming(first, first.flip(1), 0.2) == pytest.approx(2 / 5)
    assert stability.hamming(first, first + 1, 0.2) == 0.0


def test_hamming_of_a_random_mask():
    """2 rho (1 - rho)."""
    assert stability.hamming(torch.rand(300, 300), torch.rand(300, 300), 0.1) == pytest.approx(0.18, abs=0.005)


def test_the_first_prompts_are_a_probe_of_their_own():
    model = tiny_llama()
    many = probe(model, num_prompts=6, num_probes=2, prompt_length=8, progress=False)
    few = stability.first_prompts(many, 3)
    assert few.num_prompts == 3
    for name in few.module_names:
        assert torch.equal(few.sensitivity(name), many.sensitivity(name)[:3])
        assert torch.equal(few.activation(name), many.activation(name)[:3])
