"""Images of noise before the prompts: on every architecture that reads images, and what they change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from dowser_peft import DowserConfig, ProbeStatistics, probe
from tests import models
from tests.architectures import MULTIMODAL, Architecture
from tests.models import BOS, HIDDEN, IMAGE

QUICK: dict[str, Any] = {"num_prompts": 4, "num_probes": 2, "prompt_length": 6}
UNKNOWN = [models.tiny_mllama, models.tiny_nvila]
KNOWN = [row for row in MULTIMODAL if row.build not in UNKNOWN]
# Placeholders: patches of 4 x 4 pixels, merged by four in Qwen; crops and newlines of LLaVA-OneVision as in its test.
TOKENS = {"qwen2_5_vl": 256, "qwen3_vl": 256, "llava_onevision": 10}
MARKED = {"qwen2_5_vl": (7, 8), "qwen3_vl": (7, 8), "gemma3_multimodal": (7, 8)}


def images_of(model: nn.Module, **options: Any) -> ProbeStatistics:
    return probe(model, images=True, progress=False, **QUICK | options)


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Inputs of the forward passes with images."""
    seen: list[dict[str, torch.Tensor]] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values") is not None:
            seen.append(kwargs)

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_every_prompt_is_behind_an_image_that_counts(row: Architecture) -> None:
    model = row.build()
    text = probe(model, **QUICK, progress=False)
    with recorded(model) as seen:
        found = images_of(model, batch_size=2)
    assert set(found.module_names) == row.targets and (found.num_prompts, found.images) == (4, True)
    for name in row.targets:
        assert not torch.allclose(found.activation(name), text.activation(name), rtol=0.02, atol=0.0)
    count = TOKENS.get(row.name, 4)
    start, end = ([value] for value in MARKED[row.name]) if row.name in MARKED else ([], [])
    image = start + [IMAGE] * count + end
    for inputs in seen:
        for ids in inputs["input_ids"].tolist():
            assert ids == ([*image, BOS] if row.name == "paligemma" else [BOS, *image]) + ids[len(image) + 1 :]
            assert len(ids) == len(image) + 6 and not {IMAGE, BOS} & set(ids[len(image) + 1 :])
    # The model sees these very pixels: others give other statistics.
    inverted = [
        {name: -value if name == "pixel_values" else value for name, value in inputs.items()} for inputs in seen[1:]
    ]
    same, other = (probe(model, batches=b, num_probes=2, progress=False) for b in (seen[1:], inverted))
    name = min(row.targets)
    torch.testing.assert_close(same.activation(name).float(), found.activation(name).float(), rtol=0.01, atol=0.0)
    assert not torch.allclose(other.activation(name), same.activation(name), rtol=1e-3, atol=0.0)


def test_activations_of_a_llava_by_hand() -> None:
    """Mean |h| over BOS, the four image tokens and the text, with embeddings put together here."""
    model = models.tiny_llava()
    with recorded(model) as seen:
        found = images_of(model, batch_size=1)
    for prompt, inputs in enumerate(seen[1:]):
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]  # [4, hidden]
            words = model.get_input_embeddings()(inputs["input_ids"][0])
            hidden = torch.cat([words[:1], features, words[5:]])
            layer = model.model.language_model.layers[0]
            expected = layer.input_layernorm(hidden).abs().mean(0)
        name = "model.language_model.layers.0.self_attn.q_proj"
        torch.testing.assert_close(found.activation(name)[prompt].float(), expected, rtol=2**-7, atol=0.0)


def test_the_pixels_are_standard_normal_and_each_prompts_own() -> None:
    model = models.tiny_llava()
    with recorded(model) as seen:
        images_of(model, num_prompts=64, batch_size=16)
    pixels = torch.cat([inputs["pixel_values"] for inputs in seen[1:]])
    assert pixels.shape == (64, 3, 8, 8)
    assert pixels.mean().item() == pytest.approx(0.0, abs=0.05) and pixels.std().item() == pytest.approx(1.0, abs=0.05)
    assert len(pixels.flatten(1).unique(dim=0)) == 64
    with recorded(model) as again:
        images_of(model, num_prompts=8, batch_size=3, seed=1)
    other = torch.cat([inputs["pixel_values"] for inputs in again[1:]])
    assert not torch.equal(other, pixels[:8])


@pytest.mark.parametrize("build", [models.tiny_llava, models.tiny_qwen2_5_vl])
def test_the_batch_size_changes_nothing(build: Any) -> None:
    one, all_at_once = (images_of(build(), batch_size=size) for size in (1, 4))
    for name in one.module_names:
        torch.testing.assert_close(one.activation(name), all_at_once.activation(name), rtol=0.01, atol=0.0)
        torch.testing.assert_close(one.sensitivity(name), all_at_once.sensitivity(name), rtol=0.01, atol=1e-4)


def test_the_text_is_that_of_a_probe_without_images() -> None:
    """So that masks with and without images differ by the images alone; and in rounds as at once."""
    model = models.tiny_llava()
    ids: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)
    probe(model, **QUICK, progress=False)
    text = ids[-1]
    images_of(model)
    assert torch.equal(torch.cat([ids[-1][:, :1], ids[-1][:, 5:]], 1), text)
    handle.remove()
    rounds = images_of(model, tolerance=1e-9)
    once = images_of(model, num_prompts=8, num_probes=1)
    name = rounds.module_names[0]
    assert rounds.num_prompts == 8 and rounds.images
    torch.testing.assert_close(rounds.activation(name), once.activation(name), rtol=0.01, atol=0.0)


def test_a_model_in_bfloat16() -> None:
    model = models.tiny_llava().bfloat16()
    with recorded(model) as seen:
        assert images_of(model).images
    assert seen[-1]["pixel_values"].dtype == torch.bfloat16


def test_a_4bit_and_an_offloaded_model(tmp_path: Path) -> None:
    models.tiny_llava().bfloat16().save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    quantised = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=four_bit, dtype=torch.bfloat16
    )
    offloaded = cpu_offload(models.tiny_llava(), execution_device=torch.device("cpu"))
    plain = images_of(models.tiny_llava())
    name = plain.module_names[0]
    assert torch.equal(images_of(offloaded).activation(name), plain.activation(name))
    with recorded(quantised) as seen:
        assert bool(images_of(quantised).activation(name).any())
    assert all(inputs["pixel_values"].dtype == torch.bfloat16 for inputs in seen)


# --- what cannot be


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_bert, models.tiny_t5])
def test_a_model_of_text_alone_says_so(build: Any) -> None:
    model = build()
    with pytest.raises(ValueError, match=f"{type(model).__name__} takes no pixel_values: probe it without images"):
        images_of(model)


@pytest.mark.parametrize("build", UNKNOWN)
def test_an_unknown_kind_of_image_says_what_to_do(build: Any) -> None:
    model = build()
    with pytest.raises(ValueError, match=rf"how {type(model).__name__} reads an image is not known.*batches=\.\.\."):
        images_of(model)


def test_a_model_that_refuses_the_image_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny_llava()

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("image_flags")

    monkeypatch.setattr(model.model.vision_tower, "forward", refuses)
    with pytest.raises(ValueError, match="is not known") as caught:
        images_of(model)
    assert isinstance(caught.value.__cause__, KeyError)
    monkeypatch.undo()
    monkeypatch.setattr(type(model), "get_image_features", lambda self, pixel_values: torch.zeros(3, HIDDEN))
    with pytest.raises(ValueError, match="is not known") as caught:  # the count is wrong: the forward pass refuses
        images_of(model)
    assert isinstance(caught.value.__cause__, ValueError)


def test_batches_bring_their_own_images() -> None:
    with pytest.raises(ValueError, match="leave them out with batches"):
        probe(models.tiny_llava(), batches=[{"input_ids": torch.ones(1, 3)}], images=True)


# --- the adapter


def test_an_adapter_by_images(tmp_path: Path) -> None:
    def masks(**options: Any) -> dict[str, torch.Tensor]:
        model = get_peft_model(models.tiny_llava(), DowserConfig(rho=0.3, **QUICK | options))
        model.save_pretrained(tmp_path)
        return {name: value for name, value in model.state_dict().items() if "dowser_mask" in name}

    text, images = masks(), masks(probe_images=True)
    changed = [name for name in text if not torch.equal(text[name], images[name])]
    assert len(changed) > len(text) / 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["probe_images"] is True
    loaded = PeftModel.from_pretrained(models.tiny_llava(), tmp_path)
    found = loaded.state_dict()
    assert all(torch.equal(found[name], value) for name, value in images.items())
    text, images = masks(importance="wanda"), masks(importance="wanda", probe_images=True)
    assert any(not torch.equal(text[name], images[name]) for name in text)


def test_the_saved_config_tells_of_the_images_of_given_statistics(tmp_path: Path) -> None:
    statistics = images_of(models.tiny_llava())
    statistics.save(tmp_path / "statistics.safetensors")
    assert ProbeStatistics.load(tmp_path / "statistics.safetensors").images
    config = DowserConfig(importance=tmp_path / "statistics.safetensors")
    get_peft_model(models.tiny_llava(), config).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["probe_images"] is True
    assert config.probe_images is False  # a reused config probes as it was asked to
