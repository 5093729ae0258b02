"""One probe of one model: what is probed, what is refused, and what of the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dowser_peft import ProbeStatistics, probe
from dowser_peft.base_layer import linear_shape
from dowser_peft.probing import Sampling, collect_statistics
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


def test_only_rounding_separates_the_stored_statistics_from_the_collected_ones() -> None:
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
