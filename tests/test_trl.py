"""TRL's trainers, given a DowserConfig where people give a LoraConfig: text, images, preferences, 4-bit bases.

TRL's own defaults stay on where they are cheap: bf16 autocast and gradient checkpointing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from dowser_peft import DowserConfig
from tests import models
from tests.architectures import random_tokens
from tests.models import tiny_llama, tiny_llava
from tests.test_model import QUICK, dowser_layers

ARGUMENTS: dict[str, Any] = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
# Sentences of a language of eighty words; the second halves are what is learned.
PROMPTS = ["w10 w11 w12", "w20 w21", "w30 w31 w32 w33", "w40"]
ANSWERS = [" w13 w14", " w22 w23 w24", " w34", " w41 w42 w43"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, made offline; its special tokens are those of the tiny models."""
    special = {"<pad>": models.PAD, "<bos>": models.BOS, "<eos>": models.EOS, "<unk>": 3, "<image>": models.IMAGE}
    words = {f"w{index}": index for index in range(models.VOCABULARY) if index not in special.values()}
    backend = Tokenizer(WordLevel(special | words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def processor() -> LlavaProcessor:
    """Images of 8 x 8 pixels, which CLIP sees as four patches of 4 x 4 and a class token that LLaVA drops."""
    size = {"height": 8, "width": 8}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def images() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(PROMPTS), 12, 12, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_only_values_train(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(name.endswith("dowser_values.default") for name in trainable)
    assert all(p.dtype == torch.float32 for p in trainable.values())


def trained_model(trainer: Any) -> nn.Module:
    """The model without the autocast around its forward."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=random_tokens(), **inputs).logits


def test_sft_on_text(tmp_path: Path) -> None:
    base = tiny_llama()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict({"text": [a + b for a, b in zip(PROMPTS, ANSWERS, strict=True)]}),
        processing_class=tokenizer(),
        peft_config=DowserConfig(**QUICK),
    )
    assert_only_values_train(trainer.model)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    for name, parameter in trainer.model.get_base_model().named_parameters():
        if "dowser_values" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    trained = logits(trained_model(trainer))
    assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(loaded.merge_and_unload()), trained)


def test_sft_on_images(tmp_path: Path) -> None:
    """An MLLM, images through its processor, the loss on the answers."""
    trainer = SFTTrainer(
        model=tiny_llava(),
        args=SFTConfig(output_dir=str(tmp_path), remove_unused_columns=False, **ARGUMENTS),
        train_dataset=Dataset.from_dict(
            {"image": images(), "prompt": [f"<image> {prompt}" for prompt in PROMPTS], "completion": ANSWERS}
        ),
        processing_class=processor(),
        peft_config=DowserConfig(**QUICK),
    )
    assert_only_values_train(trainer.model)
    assert all("language_model" in name for name in dowser_layers(trainer.model))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert (batch["input_ids"] == models.IMAGE).sum(1).tolist() == [4] * 4
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llava(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trained_model(trainer).eval()(**batch).logits)


PREFERENCES = {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ANSWERS[1:] + ANSWERS[:1]}


def test_dpo(tmp_path: Path) -> None:
    """The reference is the base model: the adapter, disabled. So the first loss is that of a coin flip."""
    trainer = DPOTrainer(
        model=tiny_llama(),
        args=DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(PREFERENCES),
        processing_class=tokenizer(),
        peft_config=DowserConfig(**QUICK),
    )
    assert_only_values_train(trainer.model)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[-1] < losses[0]
    assert logged(trainer, "rewards/margins")[-1] > 0


@pytest.fixture
def sft_adapter(tmp_path: Path) -> Path:
    """A saved adapter that has moved."""
    model = get_peft_model(tiny_llama(), DowserConfig(**QUICK))
    for layer in dowser_layers(model).values():
        layer.dowser_values["default"].data += 0.1
    model.save_pretrained(tmp_path / "sft")
    return tmp_path / "sft"


def test_dpo_on_the_merged_model(sft_adapter: Path, tmp_path: Path) -> None:
    """The trained adapter is merged, and the preferences train a new one, probed on the merged model."""
    merged = PeftModel.from_pretrained(tiny_llama(), sft_adapter).merge_and_unload()
    reference = logits(merged)
    trainer = DPOTrainer(
        model=merged,
        args=DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(PREFERENCES),
        processing_class=tokenizer(),
        peft_config=DowserConfig(**QUICK),
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2))
    with trained_model(trainer).disable_adapter():
        assert torch.equal(logits(trainer.model), reference)


def test_dpo_goes_on_with_an_adapter(sft_adapter: Path, tmp_path: Path) -> None:
    """The merged model is the reference. Left to itself, TRL 1.16 takes the base: it copies LoRA's parameters only."""
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(tiny_llama(), sft_adapter, is_trainable=True),
        ref_model=PeftModel.from_pretrained(tiny_llama(), sft_adapter).merge_and_unload(),
        args=DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict(PREFERENCES),
        processing_class=tokenizer(),
    )
    assert_only_values_train(trainer.model)
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2))  # the reference is the adapter that training starts from
    assert losses[-1] < losses[0]


def test_sft_on_a_4bit_base(tmp_path: Path) -> None:
    """TRL 1.16 rounds what trains over a quantised base to bfloat16, where small updates are lost: undo it."""
    tiny_llama(hidden_size=64, intermediate_size=128, head_dim=32).save_pretrained(tmp_path / "base")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4, device_map="cpu"),
        args=SFTConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_dict({"text": [a + b for a, b in zip(PROMPTS, ANSWERS, strict=True)]}),
        processing_class=tokenizer(),
        peft_config=DowserConfig(**QUICK),
    )
    trainer.model.base_model._cast_adapter_dtype("default")  # back to float32
    assert_only_values_train(trainer.model)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert_only_values_train(trainer.model)
