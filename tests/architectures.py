"""Architectures and what is expected of each: its default targets, and inputs of one training step.

Read by test_targets.py and test_architectures.py; README's table "works with" links here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from tests import models
from tests.models import HIDDEN, IMAGE, LAYERS, VOCABULARY

Inputs = dict[str, torch.Tensor]

_IMAGE_TOKENS = 4  # of an image of 8 x 8 pixels in patches of 4 x 4

LLAMA = {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
PHI = {f"self_attn.{p}_proj" for p in "qkv"} | {"self_attn.dense", "mlp.fc1", "mlp.fc2"}
PHI3 = {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}
GPT2 = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
BLOOM = {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
NEOX = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
BART = {f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")} | {"fc1", "fc2"}
BART_CROSS = {f"encoder_attn.{p}_proj" for p in ("q", "k", "v", "out")}
BERT = {f"attention.self.{p}" for p in ("query", "key", "value")}
BERT |= {"attention.output.dense", "intermediate.dense", "output.dense"}
T5_ENCODER = {f"layer.0.SelfAttention.{p}" for p in "qkvo"} | {f"layer.1.DenseReluDense.{p}" for p in ("wi", "wo")}
T5_DECODER = {f"layer.0.SelfAttention.{p}" for p in "qkvo"} | {f"layer.1.EncDecAttention.{p}" for p in "qkvo"}
T5_DECODER |= {f"layer.2.DenseReluDense.{p}" for p in ("wi", "wo")}
VIT = {f"attention.{p}_proj" for p in ("q", "k", "v", "o")} | {"mlp.fc1", "mlp.fc2"}
MIXTRAL = {f"self_attn.{p}_proj" for p in "qkvo"}
QWEN_MOE = MIXTRAL | {f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down")}
DEEPSEEK = {f"self_attn.{p}" for p in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
DEEPSEEK_DENSE = DEEPSEEK | {f"mlp.{p}_proj" for p in ("gate", "up", "down")}
DEEPSEEK_MOE = DEEPSEEK | {f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")}
LLAMA4_DENSE = MIXTRAL | {f"feed_forward.{p}_proj" for p in ("gate", "up", "down")}
LLAMA4_MOE = MIXTRAL | {f"feed_forward.shared_expert.{p}_proj" for p in ("gate", "up", "down")}
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def in_layers(stack: str, inside: set[str], layers: Iterable[int] = range(LAYERS)) -> set[str]:
    """Full names of the modules ``inside`` the numbered layers of ``stack``."""
    return {f"{stack}.{index}.{name}" for index in layers for name in inside}


def random_tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Tokens that are not special in any of the models, the same on every call."""
    return torch.randint(10, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> torch.Tensor:
    """The same on every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def text() -> Inputs:
    ids = random_tokens()
    return {"input_ids": ids, "labels": ids}


def text_class() -> Inputs:
    return {"input_ids": random_tokens(), "labels": torch.tensor([0, 2])}


def image_class() -> Inputs:
    return {"pixel_values": noise(2, 3, 8, 8), "labels": torch.tensor([0, 2])}


def speech() -> Inputs:
    return {"input_features": noise(2, 8, 24), "labels": random_tokens()}


def image_before_text(pixels: torch.Tensor, image_tokens: int = _IMAGE_TOKENS, **more: torch.Tensor) -> Inputs:
    """Text after as many placeholders as there are image tokens; the loss is that of the text."""
    ids = random_tokens()
    image = torch.full((len(ids), image_tokens), IMAGE)
    labels = torch.cat([torch.full_like(image, -100), ids], 1)
    return {"input_ids": torch.cat([image, ids], 1), "pixel_values": pixels, "labels": labels, **more}


def one_image() -> Inputs:
    return image_before_text(noise(2, 3, 8, 8))


def list_of_images() -> Inputs:
    return image_before_text(noise(2, 1, 3, 8, 8))


def image_in_crops() -> Inputs:
    """The whole image, and one crop of it whose two rows each end in a newline token."""
    sizes = torch.tensor([[8, 8], [8, 8]])
    return image_before_text(noise(2, 2, 3, 8, 8), _IMAGE_TOKENS + 2 * (2 + 1), image_sizes=sizes)


def image_with_token_types(name: str, text_type: int) -> Callable[[], Inputs]:
    """Image tokens are of type 1 - ``text_type``."""

    def inputs() -> Inputs:
        found = one_image()
        is_text = (found["input_ids"] != IMAGE).long()
        return found | {name: is_text if text_type else 1 - is_text}

    return inputs


def image_in_patches() -> Inputs:
    """16 x 16 pixels as 4 x 4 flattened patches of two equal frames; four patches are merged into a token."""
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    found = image_before_text(noise(2 * 16, 3 * 2 * 4 * 4), image_grid_thw=grid)
    return found | {"mm_token_type_ids": (found["input_ids"] == IMAGE).long()}


def image_in_one_tile() -> Inputs:
    """One image token; the tokens of the image come in through cross-attention."""
    found = image_before_text(noise(2, 1, 1, 3, 8, 8), 1)
    one = torch.ones(2, 1, dtype=torch.long)
    reads = torch.ones(2, found["input_ids"].shape[1], 1, 1, dtype=torch.long)
    return found | {"aspect_ratio_ids": one, "aspect_ratio_mask": one[:, None], "cross_attention_mask": reads}


def image_spliced_in() -> Inputs:
    """The model itself puts the image before the text."""
    ids = random_tokens()
    labels = torch.cat([torch.full((len(ids), _IMAGE_TOKENS), -100), ids], 1)
    return {"input_ids": ids, "pixel_values": noise(2, 3, 8, 8), "labels": labels}


def hidden_states() -> Inputs:
    return {"x": noise(2, 5, HIDDEN)}


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        build: makes the model, the same on every call.
        targets: full names of the modules that are adapted by default.
        inputs: of one training step, labels included where the model computes its loss.
        parameters: full names of the parameters of fused experts that are adapted by default.
    """

    build: Callable[[], nn.Module]
    targets: set[str]
    inputs: Callable[[], Inputs] = text
    parameters: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return self.build.__name__.removeprefix("tiny_")


_EXPERTS = frozenset(in_layers("model.layers", EXPERTS))
_MULTIMODAL = in_layers("model.language_model.layers", LLAMA)
_TEXT_MODEL = in_layers("model.text_model.layers", LLAMA)
_T5 = in_layers("encoder.block", T5_ENCODER) | in_layers("decoder.block", T5_DECODER)
_BART = in_layers("model.encoder.layers", BART) | in_layers("model.decoder.layers", BART | BART_CROSS)

TEXT = [
    Architecture(models.tiny_llama, in_layers("model.layers", LLAMA)),
    Architecture(models.tiny_qwen2, in_layers("model.layers", LLAMA)),
    Architecture(models.tiny_qwen3, in_layers("model.layers", LLAMA)),
    Architecture(models.tiny_mistral, in_layers("model.layers", LLAMA)),
    Architecture(models.tiny_gemma, in_layers("model.layers", LLAMA)),
    Architecture(models.tiny_gemma2, in_layers("model.layers", LLAMA)),
    Architecture(models.tiny_gemma3, in_layers("model.layers", LLAMA)),
    Architecture(models.tiny_phi, in_layers("model.layers", PHI)),
    Architecture(models.tiny_phi3, in_layers("model.layers", PHI3)),
    Architecture(models.tiny_gpt2, in_layers("transformer.h", GPT2)),
    Architecture(models.tiny_opt, in_layers("model.decoder.layers", BART)),
    Architecture(models.tiny_falcon, in_layers("transformer.h", BLOOM)),
    Architecture(models.tiny_bloom, in_layers("transformer.h", BLOOM)),
    Architecture(models.tiny_gpt_neox, in_layers("gpt_neox.layers", NEOX)),
    Architecture(models.tiny_mixtral, in_layers("model.layers", MIXTRAL), parameters=_EXPERTS),
    Architecture(models.tiny_qwen2_moe, in_layers("model.layers", QWEN_MOE), parameters=_EXPERTS),
    Architecture(models.tiny_qwen3_moe, in_layers("model.layers", MIXTRAL), parameters=_EXPERTS),
    Architecture(models.tiny_olmoe, in_layers("model.layers", MIXTRAL), parameters=_EXPERTS),
    Architecture(
        models.tiny_deepseek_v3,
        in_layers("model.layers", DEEPSEEK_DENSE, [0]) | in_layers("model.layers", DEEPSEEK_MOE, [1]),
        parameters=frozenset(in_layers("model.layers", EXPERTS, [1])),
    ),
    Architecture(
        models.tiny_llama4,
        in_layers("model.layers", LLAMA4_DENSE, [0]) | in_layers("model.layers", LLAMA4_MOE, [1]),
        parameters=frozenset(
            in_layers("model.layers", {f"feed_forward.experts.{p}_proj" for p in ("gate_up", "down")}, [1])
        ),
    ),
    Architecture(models.tiny_gpt_oss, in_layers("model.layers", MIXTRAL), parameters=_EXPERTS),
]
MULTIMODAL = [
    Architecture(models.tiny_llava, _MULTIMODAL, one_image),
    Architecture(models.tiny_llava_onevision, _MULTIMODAL, image_in_crops),
    Architecture(models.tiny_qwen2_5_vl, _MULTIMODAL, image_in_patches),
    Architecture(models.tiny_qwen3_vl, _MULTIMODAL, image_in_patches),
    Architecture(models.tiny_idefics3, _TEXT_MODEL, list_of_images),
    Architecture(models.tiny_smolvlm, _TEXT_MODEL, list_of_images),
    Architecture(models.tiny_paligemma, _MULTIMODAL, image_with_token_types("token_type_ids", text_type=1)),
    Architecture(models.tiny_gemma3_multimodal, _MULTIMODAL, image_with_token_types("token_type_ids", text_type=0)),
    Architecture(models.tiny_internvl, _MULTIMODAL, one_image),
    Architecture(models.tiny_mllama, in_layers("model.language_model.layers", LLAMA, (0, 2)), image_in_one_tile),
    Architecture(models.tiny_nvila, in_layers("llm.model.layers", LLAMA), image_spliced_in),
]
OTHER = [
    Architecture(models.tiny_bert, in_layers("bert.encoder.layer", BERT), text_class),
    Architecture(models.tiny_llama_classifier, in_layers("model.layers", LLAMA), text_class),
    Architecture(models.tiny_t5, _T5),
    Architecture(models.tiny_bart, _BART),
    Architecture(models.tiny_vit, in_layers("vit.layers", VIT), image_class),
    Architecture(models.tiny_whisper, in_layers("model.decoder.layers", BART | BART_CROSS), speech),
]
ARCHITECTURES = TEXT + MULTIMODAL + OTHER
