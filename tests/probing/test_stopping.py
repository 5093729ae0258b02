"""The adaptive stop: its estimate against brute force and against the truth, and where it ends a probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dowser_peft import ProbeStatistics, probe
from dowser_peft.model_probe import sampled_weights
from dowser_peft.probing import StoppingRule, WeightSample
from dowser_peft.targets import default_targets
from tests import models

SETTINGS: dict[str, Any] = {"num_prompts": 16, "num_probes": 8, "prompt_length": 6, "progress": False}


def synthetic(num_prompts: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """|W|, A and Psi of a layer [40, 50]: fixed factors times lognormal noise of each prompt."""
    generator = torch.Generator().manual_seed(7)
    W = torch.randn(40, 50, generator=generator).abs()
    a, psi = torch.rand(50, generator=generator) + 0.1, torch.rand(40, generator=generator) + 0.1
    generator.manual_seed(seed)
    A = a * (noise * torch.randn(num_prompts, 50, generator=generator)).exp()
    Psi = psi * (noise * torch.randn(num_prompts, 40, generator=generator)).exp()
    return W, A, Psi


def lowest(scores: torch.Tensor, rho: float) -> set[int]:
    flat = scores.flatten()
    return set(flat.argsort()[: max(1, round(rho * flat.numel()))].tolist())


def whole(W: torch.Tensor) -> WeightSample:
    """A sample that holds every weight once."""
    rows, columns = torch.meshgrid(torch.arange(W.shape[0]), torch.arange(W.shape[1]), indexing="ij")
    return WeightSample(rows.flatten(), columns.flatten(), W.flatten(), W.numel())


def test_the_estimate_is_the_mean_over_all_halves_computed_by_brute_force() -> None:
    """The rule averages over a few random halves: their mean over many sizes of N is that over all halves."""
    from itertools import combinations

    W, A, Psi = synthetic(8, 0.3)
    rule = StoppingRule(0.1, 0.1, {"layer": whole(W)})
    full = lowest(W * (Psi.T @ A), 0.1)
    errors = []
    for half in combinations(range(8), 4):
        rows = list(half)
        errors.append(1 - len(full & lowest(W * (Psi[rows].T @ A[rows]), 0.1)) / len(full))
    exact = sum(errors) / len(errors)
    found = []
    for order in range(12):  # the halves are of positions: shuffled prompts are split otherwise
        rows = torch.randperm(8, generator=torch.Generator().manual_seed(order))
        found.append(rule.mask_error({"layer": A[rows]}, {"layer": Psi[rows]}))
    assert min(errors) <= min(found) <= max(found) <= max(errors)
    assert abs(sum(found) / len(found) - exact) < 0.1 * exact


@pytest.mark.parametrize("num_prompts", [32, 128])
def test_the_estimate_is_the_distance_to_the_limit(num_prompts: int) -> None:
    W, A, Psi = synthetic(20_000, 0.5, seed=99)
    limit = lowest(W * (Psi.T @ A), 0.1)
    rule = StoppingRule(0.1, 0.1, {"layer": whole(W)})
    predicted, actual = [], []
    for seed in range(40):
        _, A, Psi = synthetic(num_prompts, 0.5, seed)
        predicted.append(rule.mask_error({"layer": A}, {"layer": Psi}))
        actual.append(1 - len(limit & lowest(W * (Psi.T @ A), 0.1)) / len(limit))
    assert sum(predicted) == pytest.approx(sum(actual), rel=0.1)


def test_larger_modules_count_more() -> None:
    W, A, Psi = synthetic(8, 0.3)
    calm = (A[:1].expand(8, -1), Psi[:1].expand(8, -1))
    sample = whole(W)
    twice = WeightSample(sample.rows, sample.columns, sample.magnitudes, 3 * sample.numel)
    alone = StoppingRule(0.1, 0.1, {"a": sample}).mask_error({"a": A}, {"a": Psi})
    activations, sensitivities = {"a": A, "b": calm[0]}, {"a": Psi, "b": calm[1]}
    both = StoppingRule(0.1, 0.1, {"a": sample, "b": twice}).mask_error(activations, sensitivities)
    assert alone > 0 and both == pytest.approx(alone / 4, rel=1e-6)


def test_one_prompt_has_no_halves() -> None:
    W, A, Psi = synthetic(1, 0.3)
    assert StoppingRule(0.1, 0.1, {"a": whole(W)}).mask_error({"a": A}, {"a": Psi}) == 1.0


def test_rounds_grow_to_where_the_error_should_be_small_enough() -> None:
    rule = StoppingRule(0.05, 0.1, {})
    assert rule.first_round(512) == 16 and rule.first_round(10) == 10
    assert rule.next_round(16, 0.2, 512) == 32  # at most twice as many
    assert rule.next_round(64, 0.06, 512) == 96  # 64 * 1.44 = 92.2
    assert rule.next_round(64, 0.0501, 512) == 72  # at least 8 more
    assert rule.next_round(64, 0.2, 100) == 100


def test_a_loose_tolerance_ends_early_and_a_strict_one_at_the_limit() -> None:
    model = models.tiny_llama()
    loose = probe(model, **SETTINGS, tolerance=0.6)
    assert loose.num_prompts == 16 and loose.num_probes == 1
    assert loose.mask_error is not None and loose.mask_error <= 0.6 and loose.mask_error_rho == 0.1
    strict = probe(model, **SETTINGS, tolerance=1e-9)
    assert strict.num_prompts == 16 * 8 and strict.num_probes == 1
    assert strict.mask_error is not None and 1e-9 < strict.mask_error < loose.mask_error
    between = probe(model, **SETTINGS, tolerance=(loose.mask_error + strict.mask_error) / 2)
    assert 16 < between.num_prompts < 128 and between.num_prompts % 8 == 0
    for name in loose.module_names:  # the first prompts are the same, wherever it ends
        assert torch.equal(strict.sensitivity(name)[:16], loose.sensitivity(name))
        assert torch.equal(strict.activation(name)[:16], loose.activation(name))


def test_an_easy_model_ends_before_a_noisy_one() -> None:
    """Weights that decide every score: then prompts hardly matter."""
    easy = models.tiny_llama()
    with torch.no_grad():
        for name in default_targets(easy):
            weight = easy.get_submodule(name).weight
            weight *= 10 ** (4 * torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) - 4)
    found, noisy = (probe(model, **SETTINGS, tolerance=0.07) for model in (easy, models.tiny_llama()))
    assert found.num_prompts < noisy.num_prompts


def test_it_probes_the_prompts_of_the_fixed_probe() -> None:
    model = models.tiny_llama()
    fixed = probe(model, **SETTINGS | {"num_prompts": 128, "num_probes": 1})
    ended = probe(model, **SETTINGS, tolerance=1e-9)
    assert fixed.mask_error is None and fixed.mask_error_rho is None
    for name in fixed.module_names:
        torch.testing.assert_close(ended.sensitivity(name), fixed.sensitivity(name), rtol=1e-2, atol=0)


def test_deterministic_and_independent_of_the_batch_size() -> None:
    model = models.tiny_llama()
    once, again = (probe(model, **SETTINGS, tolerance=0.15, seed=3) for _ in range(2))
    assert once.mask_error == again.mask_error and once.num_prompts == again.num_prompts
    for batch_size in (3, 16, 64):
        other = probe(model, **SETTINGS, tolerance=0.15, seed=3, batch_size=batch_size)
        assert other.num_prompts == once.num_prompts
        assert other.mask_error == pytest.approx(once.mask_error, abs=2e-3)  # a tie may fall the other way
        for name in once.module_names:
            torch.testing.assert_close(other.sensitivity(name), once.sensitivity(name), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("build", [models.tiny_gpt2, models.tiny_llava, models.tiny_bert, models.tiny_t5])
def test_every_kind_of_model_may_end_by_itself(build: Any) -> None:
    statistics = probe(build(), **SETTINGS | {"num_prompts": 5}, tolerance=0.3)
    assert statistics.mask_error is not None and 2 <= statistics.num_prompts <= 40


def test_the_estimate_survives_saving(tmp_path: Any) -> None:
    statistics = probe(models.tiny_llama(), **SETTINGS, tolerance=0.6, rho=0.3)
    statistics.save(tmp_path / "s")
    loaded = ProbeStatistics.load(tmp_path / "s")
    assert (loaded.mask_error, loaded.mask_error_rho) == (statistics.mask_error, 0.3)


def test_samples_are_weights_of_the_module() -> None:
    for build in (models.tiny_llama, models.tiny_gpt2):  # GPT-2 stores [in, out]
        model = build()
        name = default_targets(model)[0]
        module = model.get_submodule(name)
        sample = sampled_weights({name: module})[name]
        matrix = module.weight.T if build is models.tiny_gpt2 else module.weight
        assert torch.equal(sample.magnitudes, matrix[sample.rows, sample.columns].abs())
        assert sample.numel == matrix.numel()


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -0.1])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"probe_tolerance is a share .* in \(0, 1\)"):
        probe(models.tiny_llama(), **SETTINGS, tolerance=tolerance)


def test_what_does_not_go_together_is_refused() -> None:
    model = models.tiny_llama()
    with pytest.raises(ValueError, match="leave it out with batches"):
        probe(model, batches=[torch.ones(2, 3, dtype=torch.long)], tolerance=0.1, progress=False)
    with pytest.raises(ValueError, match="needs estimator='rms'"):
        probe(model, **SETTINGS, tolerance=0.1, estimator="mean_abs")
