"""From a bare model to masks: which weights they mark, and that a file gives the same ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dowser_peft import DowserConfig, bitmask, probe
from dowser_peft.importance import select_masks
from dowser_peft.scoring import num_trainable
from dowser_peft.targets import default_targets
from tests import models

QUICK: dict[str, Any] = {"num_prompts": 4, "num_probes": 2, "prompt_length": 6, "progress": False}


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_gpt2, models.tiny_llava])
def test_masks_from_a_file_are_those_of_the_live_statistics(build: Any, tmp_path: Path) -> None:
    model = build()
    names = default_targets(model)
    statistics = probe(model, **QUICK)
    statistics.save(tmp_path / "file.safetensors")
    live = select_masks(model, DowserConfig(importance=statistics), names)
    loaded = select_masks(model, DowserConfig(importance=str(tmp_path / "file.safetensors")), names)
    fresh = select_masks(model, DowserConfig(num_prompts=4, num_probes=2, prompt_length=6), names)
    for name in names:
        assert torch.equal(live[name], loaded[name])
        assert torch.equal(live[name], fresh[name])
        numel = model.get_submodule(name).weight.numel()
        assert bitmask.count(live[name]) == num_trainable(numel, 0.1)


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_gpt2])
def test_the_mask_marks_the_lowest_scores(build: Any) -> None:
    model = build()
    statistics = probe(model, **QUICK)
    masks = select_masks(model, DowserConfig(importance=statistics, rho=0.25), statistics.module_names)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight.detach()
        S = statistics.sensitivity(name).float().T @ statistics.activation(name).float()  # [out, in]
        if build is models.tiny_gpt2:
            S = S.T
        score = (S * weight.abs()).flatten()
        chosen = bitmask.unpack(mask, score.numel())
        assert float(score[chosen].max()) <= float(score[~chosen].min()) * (1 + 1e-5)


def test_statistics_may_cover_more_than_is_adapted() -> None:
    model = models.tiny_llama()
    statistics = probe(model, **QUICK)
    names = default_targets(model)[5:8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = select_masks(model, DowserConfig(importance=statistics), names)
    whole = select_masks(model, DowserConfig(importance=statistics), statistics.module_names)
    assert list(part) == names
    assert all(torch.equal(part[name], whole[name]) for name in names)


def test_statistics_that_cover_too_little_or_another_architecture() -> None:
    model = models.tiny_llama()
    names = default_targets(model)
    statistics = probe(model, **QUICK, target_modules=names[:3])
    assert statistics.module_names == names[:3]
    with pytest.raises(ValueError, match=r"do not cover 11 of 14 target modules"):
        select_masks(model, DowserConfig(importance=statistics), names)
    wider = models.tiny_llama(hidden_size=32)
    with pytest.raises(ValueError, match="another architecture"):
        select_masks(wider, DowserConfig(importance=statistics), names[:3])


def test_other_weights_of_the_same_shape_raise_an_alarm() -> None:
    model = models.tiny_llama()
    statistics = probe(model, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        select_masks(model.bfloat16(), DowserConfig(importance=statistics), statistics.module_names)
    for parameter in model.parameters():
        parameter.data.neg_()
    with pytest.warns(UserWarning, match=f"other base weights .fingerprint {statistics.fingerprint}; this model has"):
        select_masks(model, DowserConfig(importance=statistics), statistics.module_names)


@pytest.mark.filterwarnings("ignore:no prompt reached")
def test_an_expert_that_no_prompt_reaches_is_ranked_by_magnitude() -> None:
    model = models.tiny_routed(num_experts=6)
    names = default_targets(model)
    statistics = probe(model, batches=[torch.randn(1, 2, models.HIDDEN)], progress=False)
    idle = [name for name in names if not bool(statistics.activation(name).any())]
    assert idle and set(statistics.module_names) == set(names)
    with pytest.warns(
        UserWarning, match=rf"no prompt reached {len(idle)} of 24 modules and experts, such as '{idle[0]}'"
    ):
        select_masks(model, DowserConfig(importance=statistics), names)
    masks = select_masks(model, DowserConfig(importance=statistics), names)
    by_magnitude = select_masks(model, DowserConfig(importance="magnitude"), names)
    assert all(torch.equal(masks[name], by_magnitude[name]) for name in idle)
    assert any(not torch.equal(masks[name], by_magnitude[name]) for name in names)
