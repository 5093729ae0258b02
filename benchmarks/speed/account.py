"""Exact memory of a training step: every tensor of every method, in bytes, before there is a machine.

The model is built from its config with shape-only tensors, its target layers are replaced by what a method
keeps (``shape_layers``), and one step is replayed operation by operation while every storage is followed. What
stands still (weights, values, states, masks, indices) is summed over tensors; activations and temporaries are
those at the peak of the replayed forward and backward pass, with all gradients present (as in every
micro-batch of gradient accumulation after the first). ``accounting_check`` holds the same terms against a
measured model.

Not modelled: what one operation allocates inside its kernel, cuBLAS workspaces (32 MB), the CUDA context, rounding
and fragmentation of the allocator, the image tokens of an MLLM (they are tokens like others once projected).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import masking_utils
from transformers.initialization import no_init_weights

from benchmarks.speed.shape_layers import METHODS, WITHOUT_4BIT, Setting, ShapeLayer
from benchmarks.speed.storage_tracker import ACTIVATION, TEMPORARY, StorageTracker
from dowser_peft.targets import default_targets

_LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
_LLAMA_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8}
# Decoder shapes as published; 34B is CodeLlama's.
SHAPES: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "34b": {
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "70b": _LLAMA_70B | {"vocab_size": 128256, "num_hidden_layers": 80},
    "405b": _LLAMA_405B | {"vocab_size": 128256, "num_hidden_layers": 126},
}
OPTIMIZERS = ("adamw", "adamw8bit")
_8BIT_BLOCK, _8BIT_MINIMUM = 256, 4096  # bitsandbytes: values per float32 scale; smaller parameters keep 32 bits
TERMS = (
    "base_weights",
    "master_weights",
    "values",
    "masks",
    "indices",
    "optimizer_states",
    "gradients",
    "activations",
    "temporary",
    "largest_temporary",
    "optimizer_temporary",
)


@dataclass(frozen=True)
class Account:
    """Bytes of one method in one setting; ``total`` is the peak of a training run."""

    method: str
    trained_parameters: int
    base_weights: int
    master_weights: int
    values: int
    masks: int
    indices: int
    optimizer_states: int
    gradients: int
    activations: int
    temporary: int  # at the peak
    largest_temporary: int  # W_eff or the dense gradient of the largest layer
    optimizer_temporary: int

    @property
    def static(self) -> int:
        """Everything but activations and temporaries."""
        return sum(getattr(self, term) for term in TERMS[:7])

    @property
    def without_activations(self) -> int:
        """The peak of a step whose activations take nothing."""
        return self.static + max(self.largest_temporary, self.optimizer_temporary)

    @property
    def total(self) -> int:
        """Forward and backward, or the optimizer's step: whichever needs more."""
        return self.static + max(self.activations + self.temporary, self.optimizer_temporary)


def model_config(name_or_path: str) -> transformers.PretrainedConfig:
    """Config of a shape in ``SHAPES``, or the one saved at a path."""
    if name_or_path not in SHAPES:
        return transformers.AutoConfig.from_pretrained(name_or_path)
    if name_or_path != "llava-1.5-7b":
        return transformers.LlamaConfig(**SHAPES[name_or_path])
    text = transformers.LlamaConfig(**SHAPES[name_or_path])
    return transformers.LlavaConfig(text_config=text, vision_config=clip_l(), vision_feature_layer=-2)


def clip_l() -> transformers.CLIPVisionConfig:
    """The vision tower of LLaVA-1.5: CLIP-L/14 at 336 pixels."""
    return transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def build_shapes(config: transformers.PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of a config, frozen; under FakeTensorMode it takes no memory."""
    auto = transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = transformers.AutoModelForImageTextToText
    with no_init_weights():
        model = auto.from_config(config, dtype=dtype)
    return model.requires_grad_(False).train()


def account(
    config: transformers.PretrainedConfig,
    method: str,
    *,
    rho: float = 0.1,
    base: str = "bfloat16",
    optimizer: str = "adamw",
    tokens: int = 2048,
    batch: int = 1,
    checkpointing: bool = True,
    device: str = "cuda",
    rank: int = 64,
) -> Account:
    """Bytes of ``method`` on the default targets of the model of ``config``.

    Args:
        config: of the model.
        method: a key of ``METHODS``.
        rho: fraction that trains, of every method that has one.
        base: 'bfloat16', 'float32', or 'nf4' (4 bits with double quantisation; every linear layer but the head;
            without PEFT's prepare_model_for_kbit_training, which casts embeddings and head to float32).
        optimizer: 'adamw' (float32 states) or 'adamw8bit' (bitsandbytes).
        tokens: per sequence.
        batch: sequences of a micro-batch.
        checkpointing: gradient checkpointing, non-reentrant.
        device: 'cuda' or 'cpu'; decides derived indices and the default implementation of AdamW.
        rank: of LoRA.

    Raises:
        ValueError: if the method cannot train on a 4-bit base.
    """
    if base == "nf4" and method in WITHOUT_4BIT:
        raise ValueError(f"{method} cannot train on a 4-bit base")
    compute_dtype = torch.float32 if base == "float32" else torch.bfloat16
    tracker = StorageTracker()
    setting = Setting(rho, rank, device, base == "nf4", compute_dtype, tracker)
    with FakeTensorMode():
        model = build_shapes(config, compute_dtype)
        adapt(model, method, setting)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        static = static_terms(model)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        replay(model, tracker, tokens=tokens, batch=batch, checkpointing=checkpointing)
    sizes = [parameter.numel() for parameter in trained]
    return Account(
        method=method,
        trained_parameters=sum(sizes),
        **static,
        optimizer_states=optimizer_states(sizes, optimizer),
        gradients=sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None),
        activations=tracker.peak[ACTIVATION],
        temporary=tracker.peak[TEMPORARY],
        largest_temporary=tracker.largest[TEMPORARY],
        optimizer_temporary=optimizer_temporary(sizes, optimizer, foreach=device == "cuda"),
    )


def adapt(model: nn.Module, method: str, setting: Setting) -> None:
    """Replace the target layers by what ``method`` keeps of them, other layers by what a 4-bit base keeps."""
    targets = set(default_targets(model))
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in linear.items():
        if name in targets:
            layer = METHODS[method](module, setting)
        elif setting.nf4 and module is not head:
            layer = ShapeLayer(module, setting)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def static_terms(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers, each storage once: of the base and of what the method added."""
    term_of = {"values": "values", "a": "values", "b": "values", "mask": "masks", "indices": "indices"}
    term_of["master"] = "master_weights"
    terms = dict.fromkeys(("base_weights", "master_weights", "values", "masks", "indices"), 0)
    seen: set[int] = set()
    for module in model.modules():
        own = {**module._parameters, **module._buffers}
        for name, tensor in own.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            added = isinstance(module, ShapeLayer) and name in term_of
            terms[term_of[name] if added else "base_weights"] += tensor.nbytes
    return terms


def replay(model: Any, tracker: StorageTracker, *, tokens: int, batch: int, checkpointing: bool) -> None:
    """One forward and backward pass under ``tracker``; the loss is transformers' own, in float32."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    # Whether several sequences are packed into one is read from values: without them, transformers builds a mask.
    with tracker, mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def optimizer_states(sizes: list[int], optimizer: str) -> int:
    """Two moments per trained value, and AdamW's step counter (float32) per parameter."""
    if optimizer == "adamw":
        return sum(2 * 4 * size + 4 for size in sizes)
    small = [size for size in sizes if size < _8BIT_MINIMUM]
    large = [size for size in sizes if size >= _8BIT_MINIMUM]
    return 2 * sum(4 * size for size in small) + 2 * sum(size + 4 * -(-size // _8BIT_BLOCK) for size in large)


def optimizer_temporary(sizes: list[int], optimizer: str, *, foreach: bool) -> int:
    """What a step of AdamW allocates: the root of the second moment, of all parameters at once or one by one.

    One by one there are three: the root, the root scaled, and that of the parameter before, which Python still
    holds. Dense bfloat16 parameters step on float32 master weights, so every value counts 4 bytes.
    """
    if optimizer == "adamw8bit":
        return 0
    if foreach:
        return 4 * sum(sizes)
    return 4 * max(before + 2 * size for before, size in zip([0, *sizes], sizes, strict=False))
