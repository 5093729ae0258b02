"""From a bare model to masks: what is probed, whose weights it is, and that a file gives the same masks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dowser_peft import DowserConfig, ProbeStatistics, bitmask, probe
from dowser_peft.importance import base_fingerprint, differs_from, select_masks
from dowser_peft.scoring import num_trainable
from dowser_peft.targets import default_targets
from tests import models

QUICK: dict[str, Any] = {"num_prompts": 4, "num_probes": 2, "prompt_length": 6, "progress": False}
LORA = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, r=2)


def same(one: ProbeStatistics, other: ProbeStatistics) -> bool:
    return one.module_names == other.module_names and all(
        torch.equal(one.activation(name), other.activation(name))
        and torch.equal(one.sensitivity(name), other.sensitivity(name))
        for name in one.module_names
    )


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


def test_fingerprints() -> None:
    model = models.tiny_llama()
    modules = {name: model.get_submodule(name) for name in default_targets(model)}
    fingerprint = base_fingerprint(modules)
    assert not differs_from({f"wrapped.{name}": module for name, module in modules.items()}, fingerprint)
    assert not differs_from({name: module.half() for name, module in modules.items()}, fingerprint)
    assert differs_from(dict(list(modules.items())[1:]), fingerprint)
    modules["model.layers.1.mlp.up_proj"].weight.data.neg_()
    assert differs_from(modules, fingerprint)


def test_fingerprint_of_a_layer_with_more_weights_than_float32_can_count() -> None:
    """4096 x 11008 is beyond 2^24: an index computed in float32 would lie past the end."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16).expand(4096, 11008), requires_grad=False)
    layer.out_features, layer.in_features = 4096, 11008
    assert base_fingerprint({"layer": layer}) == base_fingerprint({"other": layer})


@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
def test_adapters_that_are_there_already(state: str) -> None:
    """A probe sees the base model; what is merged has become part of it."""
    bare = probe(models.tiny_llama(), **QUICK)
    model = get_peft_model(models.tiny_llama(), LORA)
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    if state == "merged":
        model.merge_adapter()
    flags = [getattr(module, "_disable_adapters", None) for module in model.modules()]
    found = probe(model, **QUICK)
    assert [getattr(module, "_disable_adapters", None) for module in model.modules()] == flags
    assert same(found, bare) == (state != "merged")
    assert found.module_names == bare.module_names  # as a new adapter looks for them
    assert found.fingerprint == bare.fingerprint or state == "merged"


def test_adapters_stay_enabled_after_a_failure() -> None:
    model = get_peft_model(models.tiny_llama(), LORA)
    model.base_model.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        probe(model, **QUICK)
    assert not any(getattr(module, "_disable_adapters", False) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be a positive integer"),
        ({"num_probes": 0}, "num_probes must be a positive integer"),
        ({"prompt_length": -1}, "prompt_length must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"estimator": "mean"}, "estimator must be one of"),
        ({"target_modules": ["q_proj"]}, "full module names.*such as 'model.layers.0.self_attn.q_proj'; 'q_proj'"),
        ({"target_modules": "all-linear"}, "must be a list of full module names.*'all-linear'"),
        ({"target_modules": []}, "no target modules"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(models.tiny_llama(), **QUICK | options)


def test_a_target_that_is_not_linear() -> None:
    with pytest.raises(TypeError, match=r"'model\.norm' is a LlamaRMSNorm"):
        probe(models.tiny_llama(), **QUICK, target_modules=["model.norm"])


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


def test_only_rounding_separates_the_stored_statistics_from_the_collected_ones() -> None:
    from dowser_peft.base_layer import linear_shape
    from dowser_peft.probing import Sampling, collect_statistics

    model = models.tiny_llama()
    modules = {name: model.get_submodule(name) for name in default_targets(model)}
    found = collect_statistics(
        model,
        modules,
        {name: linear_shape(module) for name, module in modules.items()},
        **QUICK,
        batches=None,
        estimator="rms",
        sampling=Sampling(),
        batch_size=None,
        seed=0,
        tokenizer=None,
    )
    statistics = probe(model, **QUICK)
    assert all(value.dtype == torch.float32 for value in (found.activations | found.sensitivities).values())
    for name in modules:
        assert torch.equal(statistics.activation(name), found.activations[found.input_groups[name]].bfloat16())
        assert torch.equal(statistics.sensitivity(name), found.sensitivities[name].bfloat16())
