"""Default targets of every kind of model, and the last n layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dowser_peft.targets import (
    default_parameters,
    default_targets,
    find_transformer,
    language_model,
    last_layers,
    warn_about_frozen_experts,
)
from tests import models
from tests.architectures import ARCHITECTURES, BERT, EXPERTS, Architecture, in_layers

ENCODER = Architecture(models.tiny_bert_encoder, in_layers("encoder.layer", BERT))


@pytest.mark.parametrize("row", [*ARCHITECTURES, ENCODER], ids=lambda row: row.name)
def test_default_targets(row: Architecture) -> None:
    model = row.build()
    names = default_targets(model)
    assert set(names) == row.targets
    order = [name for name, _ in model.named_modules()]
    assert names == sorted(names, key=order.index)
    parameters = default_parameters(model)
    assert set(parameters) == row.parameters
    order = [name for name, _ in model.named_parameters()]
    assert parameters == sorted(parameters, key=order.index)


def test_experts_that_are_fused_in_another_way_stay_frozen_with_a_warning() -> None:
    """Parameters [experts, ...] of which nothing says how they are stored and used."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(4, 3, 2))

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(2, 2), "experts": Fused()})])})
    assert default_targets(model) == ["layers.0.fc"] and default_parameters(model) == []
    with pytest.warns(
        UserWarning, match=r"experts of ModuleDict \(layers\.0\.experts\.w1 and others\) stay frozen: so"
    ):
        warn_about_frozen_experts(model, [], "so")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_frozen_experts(models.tiny_llama(), [], "so")
        mixtral = models.tiny_mixtral()
        warn_about_frozen_experts(mixtral, default_parameters(mixtral), "so")


def test_experts_that_are_not_plain_floats_or_not_of_the_decoder_are_no_targets() -> None:
    model = models.tiny_mixtral()
    model.model.layers[0].mlp.experts.to(torch.float8_e4m3fn)
    assert default_parameters(model) == sorted(in_layers("model.layers", EXPERTS, [1]), reverse=True)
    wrapped = nn.ModuleDict({"vision_tower": models.tiny_mixtral(), "language_model": models.tiny_qwen3_moe()})
    assert set(default_parameters(wrapped)) == in_layers("language_model.model.layers", EXPERTS)
    assert set(default_parameters(nn.ModuleDict({"vision_tower": models.tiny_mixtral()}))) == set()


def test_experts_that_are_linear_layers_are_targets_and_routers_are_not() -> None:
    names = default_targets(models.tiny_routed())
    assert set(names) == in_layers("layers", {f"experts.{e}.{p}" for e in range(4) for p in ("up", "down")})


def test_what_selects_stays_frozen() -> None:
    """Routers that hold a module of their own (NLLB-MoE, JetMoE), indexers of sparse attention (DeepSeek V3.2)."""
    layer = {
        "self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2), "indexer": nn.ModuleDict({"wk": nn.Linear(2, 2)})}),
        "mlp": nn.ModuleDict(
            {
                "gate": nn.Linear(2, 2),
                "router": nn.ModuleDict({"classifier": nn.Linear(2, 2)}),
                "shared_expert_gate": nn.Linear(2, 1),
                "gate_proj": nn.Linear(2, 2),
            }
        ),
    }
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(layer)])})
    assert default_targets(model) == ["layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj"]


def test_cross_attention_that_no_text_reaches_stays_frozen() -> None:
    """In layers of its own (Mllama, Idefics), or in every layer (BLIP)."""

    def layer(*attention: str) -> nn.ModuleDict:
        parts = {name: nn.ModuleDict({"q_proj": nn.Linear(2, 2)}) for name in attention}
        return nn.ModuleDict(parts | {"post_attention_layernorm": nn.LayerNorm(2), "fc": nn.Linear(2, 2)})

    model = nn.ModuleDict({"layers": nn.ModuleList([layer("self_attn"), layer("cross_attn")])})
    assert default_targets(model) == ["layers.0.self_attn.q_proj", "layers.0.fc"]
    model = nn.ModuleDict({"layers": nn.ModuleList([layer("attention", "crossattention")])})
    assert default_targets(model) == ["layers.0.attention.q_proj", "layers.0.fc"]


class _Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 2)}) for _ in range(layers))


@pytest.mark.parametrize(
    "other",
    [
        "vision_tower",
        "visual",
        "vision_model",
        "image_encoder",
        "audio_tower",
        "speech_encoder",
        "mm_projector",
        "connector",
        "qformer",
        "q_former",
        "perceiver_resampler",
        "codec_model",
        "protein_encoder",
    ],
)
@pytest.mark.parametrize("text", ["language_model", "llm", "text_model", "decoder", "model"])
def test_other_parts_of_a_multimodal_model_stay_out(other: str, text: str) -> None:
    model = nn.ModuleDict({other: _Tower(3), text: _Tower(2), "lm_head": nn.Linear(2, 2)})
    assert default_targets(model) == [f"{text}.layers.0.fc", f"{text}.layers.1.fc"]


def test_no_numbered_layers() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no numbered layers.*target_modules.*'all-linear' or \['0'"):
        default_targets(models.tiny_mlp())


def test_a_model_with_adapters_has_the_same_targets() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = models.tiny_llama()
    names = default_targets(model)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj", "up_proj"]), model)
    assert default_targets(model) == names


def test_language_model() -> None:
    assert language_model(models.tiny_llama())[0] == ""
    assert language_model(models.tiny_llava())[0] == "model.language_model."
    assert language_model(models.tiny_nvila())[0] == "llm."
    assert language_model(models.tiny_whisper())[0] == "model.decoder."
    assert language_model(models.tiny_t5())[0] == ""
    assert language_model(models.tiny_mlp())[0] == ""


def test_find_transformer() -> None:
    model = models.tiny_llama()
    assert find_transformer(nn.ModuleDict({"inner": model})) is model
    assert find_transformer(models.tiny_mlp()) is None


@pytest.mark.parametrize(
    ("build", "prefix"),
    [
        (models.tiny_llama, "model.layers.1."),
        (models.tiny_gpt2, "transformer.h.1."),
        (models.tiny_opt, "model.decoder.layers.1."),
        (models.tiny_mixtral, "model.layers.1."),
        (models.tiny_llava, "model.language_model.layers.1."),
        (models.tiny_idefics3, "model.text_model.layers.1."),
        (models.tiny_nvila, "llm.model.layers.1."),
        (models.tiny_bert, "bert.encoder.layer.1."),
        (models.tiny_t5, "decoder.block.1."),
        (models.tiny_bart, "model.decoder.layers.1."),
        (models.tiny_whisper, "model.decoder.layers.1."),
        (models.tiny_vit, "vit.layers.1."),
    ],
)
def test_last_layers_are_counted_from_the_output(build: Callable[[], Any], prefix: str) -> None:
    model = build()
    names = default_targets(model) + default_parameters(model)
    kept = last_layers(model, names, 1)
    assert kept == [name for name in names if name.startswith(prefix)]
    both = last_layers(model, names, 2)
    assert set(kept) < set(both) <= set(names)
    with pytest.raises(ValueError, match="num_last_layers=3, but the decoder has 2 layers"):
        last_layers(model, names, 3)


def test_last_layers_count_all_layers_not_only_the_targets() -> None:
    model = models.tiny_llama(num_hidden_layers=4)
    names = [f"model.layers.{index}.mlp.up_proj" for index in (0, 1, 2)]
    assert last_layers(model, names, 2) == ["model.layers.2.mlp.up_proj"]
    with pytest.raises(ValueError, match="no target module lies in the last 1 of 4"):
        last_layers(model, names, 1)


def test_the_depth_of_a_vision_tower_does_not_count() -> None:
    model = nn.ModuleDict({"vision_tower": _Tower(9), "decoder": _Tower(3)})
    assert last_layers(model, default_targets(model), 1) == ["decoder.layers.2.fc"]


def test_a_wrapped_model_keeps_its_names() -> None:
    names = default_targets(nn.ModuleDict({"inner": models.tiny_llava()}))
    assert names[0] == "inner.model.language_model.layers.0.self_attn.q_proj"
    with torch.device("meta"):
        assert default_targets(models.tiny_llava()) == [name.removeprefix("inner.") for name in names]
