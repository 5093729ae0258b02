"""A probe by several ranks: the same statistics and masks as by one, and no rank that waits for ever."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn

from dowser_peft import DowserConfig, ProbeStatistics, importance, model_probe, probe, this_rank_only
from dowser_peft import fingerprint as fingerprint_module
from dowser_peft.probing import collect
from tests import models
from tests.distributed.launch import outcomes, run_ranks
from tests.test_model import dowser_layers

QUICK: dict[str, Any] = {"num_prompts": 5, "num_probes": 2, "prompt_length": 6, "batch_size": 1, "progress": False}
PADDED = {
    "input_ids": torch.randint(6, 96, (2, 7), generator=torch.Generator().manual_seed(1)),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
}
BATCHES = [PADDED, torch.randint(6, 96, (3, 5), generator=torch.Generator().manual_seed(2)), PADDED]

# Whom to probe, and how. Five prompts do not divide by two or three, one is less than there are ranks.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "prompts": (models.tiny_llama, {}),
    "one prompt": (models.tiny_llama, {"num_prompts": 1}),
    "the authors' estimator": (models.tiny_llama, {"estimator": "mean_abs", "num_prompts": 7}),
    "adaptive stop": (models.tiny_llama, {"tolerance": 0.15, "num_prompts": 64}),
    "adaptive stop at the limit": (models.tiny_llama, {"tolerance": 1e-6, "num_prompts": 10}),
    "batches": (models.tiny_llama, {"batches": BATCHES}),
    "noise": (models.tiny_vit, {"num_prompts": 3}),
    "prompts with images": (models.tiny_llava, {"images": True}),
    "encoder-decoder": (models.tiny_t5, {}),
}
FOR_THREE = ["prompts", "one prompt", "adaptive stop", "batches"]


def probed(case: str) -> ProbeStatistics:
    build, options = CASES[case]
    return probe(build(), **QUICK | options)


def joined(timeout_s: float = 60.0) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


def probe_cases(cases: list[str]) -> dict[str, ProbeStatistics]:
    joined()
    return {case: probed(case) for case in cases}


@pytest.mark.parametrize(("size", "cases"), [(2, list(CASES)), (3, FOR_THREE)])
def test_the_statistics_are_those_of_one_process(size: int, cases: list[str]) -> None:
    """Bit for bit with one prompt a batch, as here: matrices of other sizes may round their sums otherwise."""
    by_rank = run_ranks(probe_cases, cases, size=size)
    for case in cases:
        expected = probed(case)
        for found in (statistics[case] for statistics in by_rank):
            assert found.module_names == expected.module_names, case
            assert found.input_groups == expected.input_groups, case
            assert (found.fingerprint, found.mask_error) == (expected.fingerprint, expected.mask_error), case
            assert found.num_prompts == expected.num_prompts, case
            for name in expected.module_names:
                assert torch.equal(found.activation(name), expected.activation(name)), (case, name)
                assert torch.equal(found.sensitivity(name), expected.sensitivity(name)), (case, name)


def own_batches() -> ProbeStatistics:
    joined()
    return probe(models.tiny_llama(), batches=[BATCHES[dist.get_rank()]], progress=False)


def test_batches_of_each_rank_are_probed_one_after_the_other() -> None:
    expected = probe(models.tiny_llama(), batches=BATCHES[:2], progress=False)
    for found in run_ranks(own_batches):
        for name in expected.module_names:
            assert torch.equal(found.activation(name), expected.activation(name))
            assert torch.equal(found.sensitivity(name), expected.sensitivity(name))


def experts() -> dict[str, str]:
    """Each rank sees tokens that go to other experts."""
    joined()
    tokens = torch.randn(1, 2, models.HIDDEN, generator=torch.Generator().manual_seed(dist.get_rank()))
    found = probe(models.tiny_routed(num_experts=6), batches=[tokens], progress=False)
    return {name: found.sensitivity(name).tolist() for name in found.module_names}


def test_an_expert_that_only_one_rank_calls() -> None:
    tokens = [torch.randn(1, 2, models.HIDDEN, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    whole = probe(models.tiny_routed(num_experts=6), batches=tokens, progress=False)
    called = [whole.sensitivity(name).any(1) for name in whole.module_names]
    assert any(bool(rows[0]) != bool(rows[1]) for rows in called)
    expected = {name: whole.sensitivity(name).tolist() for name in whole.module_names}
    assert run_ranks(experts) == [expected, expected]


def selections(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.selections[adapter] for name, layer in dowser_layers(model).items()}


def adapted(granularity: str) -> PeftModel:
    config = DowserConfig(num_prompts=6, num_probes=2, prompt_length=6, granularity=granularity)
    model = get_peft_model(models.tiny_llama(), config)
    model.add_adapter("second", DowserConfig(importance="magnitude", granularity=granularity, rho=0.2))
    return model


def chosen(granularity: str, first_only: bool, on_meta: bool) -> Any:
    joined()
    build = models.tiny_llama
    if dist.get_rank() > 0:
        if first_only:
            importance._select = None  # type: ignore[assignment]  not to be called, nor these:
            model_probe.base_fingerprint = fingerprint_module.base_fingerprint = None  # type: ignore[assignment]
        if on_meta:
            models.tiny_llama = lambda: build().to("meta")
    model = adapted(granularity)
    fingerprints = {layer.base_fingerprint["default"] for layer in dowser_layers(model).values()}
    return selections(model), selections(model, "second"), fingerprints


@pytest.mark.parametrize("granularity", ["element", "column"])
@pytest.mark.parametrize("on_meta", [False, True], ids=["weights everywhere", "weights on the first rank"])
def test_masks_come_from_the_first_rank(granularity: str, on_meta: bool) -> None:
    model = adapted(granularity)
    expected = selections(model), selections(model, "second")
    fingerprint = next(iter(dowser_layers(model).values())).base_fingerprint["default"]
    for *found, fingerprints in run_ranks(chosen, granularity, True, on_meta):
        for ours, theirs in zip(expected, found, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert fingerprints == {fingerprint}


def damaged_on_rank_1() -> None:
    joined()
    model = models.tiny_llama()
    if dist.get_rank() == 1:
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    probe(model, **QUICK)


def test_when_one_rank_fails_all_do() -> None:
    (first, first_error), (second, second_error) = outcomes(damaged_on_rank_1)
    assert not first and "RuntimeError: rank 1 failed at this" in first_error
    assert "up_proj' holds NaN" in first_error
    assert not second and "ValueError: the output of module 'model.layers.1.mlp.up_proj' holds NaN" in second_error


def short_of_memory() -> ProbeStatistics:
    """Rank 1 has room for one prompt at a time."""
    joined()
    probe_batch = collect._Run._probe_batch

    def with_little_memory(self: Any, batch: Any, bar: Any) -> Any:
        if dist.get_rank() == 1 and batch.num_prompts > 1:
            raise torch.OutOfMemoryError("no room")
        return probe_batch(self, batch, bar)

    collect._Run._probe_batch = with_little_memory  # type: ignore[method-assign]
    return probe(models.tiny_llama(), **QUICK | {"batch_size": None})


def test_all_ranks_start_again_with_smaller_batches_if_one_is_short_of_memory() -> None:
    expected = probed("prompts")
    for found in run_ranks(short_of_memory):
        for name in expected.module_names:
            assert torch.equal(found.sensitivity(name), expected.sensitivity(name))


def rank_0_probes(alone: bool) -> str | int:
    joined(timeout_s=3.0)
    if dist.get_rank() == 1:
        return "elsewhere"
    if not alone:
        probe(models.tiny_llama(), **QUICK)
    with this_rank_only():
        return probe(models.tiny_llama(), **QUICK).num_prompts


def test_a_rank_that_probes_without_the_others_says_so_and_gives_up() -> None:
    (succeeded, error), (_, other) = outcomes(rank_0_probes, [False], timeout_s=60.0)
    assert not succeeded and other == "elsewhere"
    assert "RuntimeError: rank 0 is to probe a model together with all ranks" in error
    assert "has waited for rank 1" in error and "with dowser_peft.this_rank_only(): ..." in error


def test_a_rank_may_probe_alone() -> None:
    assert run_ranks(rank_0_probes, True) == [QUICK["num_prompts"], "elsewhere"]


def at_different_things() -> None:
    joined()
    if dist.get_rank() == 0:
        probe(models.tiny_llama(), **QUICK)
    get_peft_model(models.tiny_llama(), DowserConfig(importance="magnitude"))


def with_different_settings() -> None:
    joined()
    get_peft_model(models.tiny_llama(), DowserConfig(importance="magnitude", rho=0.1 + 0.1 * dist.get_rank()))


def test_ranks_at_different_things_are_told() -> None:
    for rank, (succeeded, error) in enumerate(outcomes(at_different_things)):
        assert not succeeded
        mine, other = ("probe a model", "add a new adapter")[:: 1 - 2 * rank]
        assert f"rank {rank} is to {mine}, rank {1 - rank} to {other}. Make the same call on every rank" in error
    for succeeded, error in outcomes(with_different_settings):
        assert not succeeded
        assert "to add a new adapter, of another model or with other settings" in error


def test_several_processes_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="one of 2 processes, but torch.distributed is not initialised"):
        probe(models.tiny_llama(), **QUICK)
    with warnings.catch_warnings(), this_rank_only():
        warnings.simplefilter("error")
        probe(models.tiny_llama(), **QUICK)
