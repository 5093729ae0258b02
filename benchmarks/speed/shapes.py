"""Randomly initialised Llamas of growing size: all that speed and memory depend on, without a download."""

from __future__ import annotations

from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dowser_peft.targets import default_targets


class Shape(NamedTuple):
    """The sizes of a Llama; its name in :data:`SHAPES` tells the weights of its target layers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 4096  # small, so that a small model is made of decoder layers as a large one is


SHAPES = {
    "tiny": Shape(64, 128, 2, 2, 96),
    "10m": Shape(384, 1024, 6, 6),
    "33m": Shape(512, 1408, 10, 8),
    "100m": Shape(1024, 2752, 8, 16),
    "200m": Shape(1024, 2752, 16, 16),
    "1b": Shape(2048, 5504, 20, 16, 32000),
    "3b": Shape(3072, 8192, 26, 24, 32000),
    "7b": Shape(4096, 11008, 32, 32, 32000),  # the decoder of LLaVA-1.5-7B
}


def build_llama(
    shape: Shape, device: torch.device, dtype: torch.dtype, *, layers: int | None = None, nf4: bool = False
) -> nn.Module:
    """A frozen model, the same on every call.

    Args:
        shape: its sizes.
        device: where it is built.
        dtype: of its weights.
        layers: fewer decoder layers than the shape has.
        nf4: store the weights of the target layers in 4 bits (bitsandbytes).
    """
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if nf4:
        for name in default_targets(model):
            model.set_submodule(name, _nf4(model.get_submodule(name)))
        model.is_loaded_in_4bit = True  # what PEFT asks for
    return model.requires_grad_(False)


def _nf4(linear: Any) -> nn.Module:
    weight = linear.weight
    quantised = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4", compute_dtype=weight.dtype
    )
    quantised.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
    return quantised.to(weight.device)  # which quantises
