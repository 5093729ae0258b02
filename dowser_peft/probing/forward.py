"""One forward pass: what goes in, which tokens are real, and which output f is probed.

f is the logits of the last real token of a model that generates, and the whole output of any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

_GOLDEN = 0x9E3779B1  # odd, so that no two seeds fall together; spreads neighbouring ones over all numbers


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass: a mapping of keyword arguments, a tensor, or positional arguments."""

    inputs: Any
    first_prompt: int
    num_prompts: int


def numbered(batches: Iterable[Any]) -> list[Batch]:
    """The user's batches, their prompts counted through.

    Raises:
        TypeError: if this is not a collection of batches.
        ValueError: if there are none.
    """
    if isinstance(batches, torch.Tensor | Mapping):
        raise TypeError("batches must be a list (or any iterable) of batches; for one batch pass batches=[batch]")
    found, first = [], 0
    for inputs in batches:
        main = _main_input(inputs)
        if main is None or main.ndim == 0:
            raise TypeError(
                "a batch must be a tensor or hold tensors, the first dimension the prompts (of a tokenizer, use "
                f"return_tensors='pt'); got {type(inputs).__name__}"
            )
        found.append(Batch(inputs, first, main.shape[0]))
        first += main.shape[0]
    if not found:
        raise ValueError("batches is empty: there is nothing to probe with")
    return found


def _main_input(inputs: Any) -> torch.Tensor | None:
    if isinstance(inputs, torch.Tensor):
        return inputs
    if isinstance(inputs, Mapping):
        named = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        inputs = [*named, *inputs.values()]
    elif not isinstance(inputs, Iterable):
        return None
    return next((value for value in inputs if isinstance(value, torch.Tensor)), None)


def prompt_generator(seed: int, prompt: int) -> torch.Generator:
    """A generator on the CPU for one prompt. Of its seed torch uses the low 32 bits alone, so both must be in them."""
    return torch.Generator().manual_seed((seed * _GOLDEN + prompt) % (1 << 32))


def split(inputs: dict[str, torch.Tensor], size: int, *, first: int = 0) -> list[Batch]:
    """Batches of at most ``size`` prompts, counted from ``first``."""
    total = next(iter(inputs.values())).shape[0]
    return [
        Batch(
            {name: value[start : start + size] for name, value in inputs.items()},
            first + start,
            min(size, total - start),
        )
        for start in range(0, total, size)
    ]


def ready_inputs(model: nn.Module, inputs: Any) -> Any:
    """``inputs`` on the device of the model and without gradients of their own."""
    device = input_device(model)

    def ready(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, torch.Tensor) else value

    if not isinstance(inputs, Mapping):
        return ready(inputs) if isinstance(inputs, torch.Tensor) else [ready(value) for value in inputs]
    moved = {name: ready(value) for name, value in inputs.items()}
    if isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        moved.pop("labels", None)  # a loss would take the logits of all tokens, in float32
    return moved


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs belong: with the first weights, or where accelerate runs them if they are offloaded."""
    first = next(model.parameters(), None)
    if first is not None and first.device.type != "meta":
        return first.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), "cpu")
    return torch.device(found)


def token_masks(model: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    """Which tokens are real, bool ``[B, T]``: 'source' tokens, and 'target' tokens of a separate decoder."""
    if not isinstance(inputs, Mapping):
        return {}
    found = {}
    for kind, prefix in (("source", ""), ("target", "decoder_")):
        mask, ids = inputs.get(f"{prefix}attention_mask"), inputs.get(f"{prefix}input_ids")
        if mask is not None and mask.ndim == 2:
            found[kind] = mask.bool()
        elif ids is not None:
            found[kind] = torch.ones(ids.shape, dtype=torch.bool)  # on the CPU: to look at it waits for no GPU
    if encoder_of(model) is not None and "target" not in found and inputs.get("labels") is not None:
        found["target"] = inputs["labels"] != -100  # the model makes the decoder's input from them
    return found


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a model that also has a decoder."""
    if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder:
        return model.get_encoder()
    return None


def generates(model: nn.Module) -> bool:
    """Whether ``model``, or the language model that it wraps, predicts the next token."""
    return any(isinstance(module, PreTrainedModel) and module.can_generate() for module in model.modules())


def probed_output(
    model: nn.Module, inputs: Any, masks: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """f: the logits ``[B, V]`` of the last real token of a model that generates, else the whole output.

    With it, for an output of every token, the mask ``[B, T]`` of the real ones.
    """
    mask = masks.get("target", masks.get("source"))
    last_token_only = generates(model)
    last_is_real = mask is None or bool(mask[:, -1].all())
    output = _main_tensor(_call(model, inputs, keep_last=last_token_only and last_is_real))
    if output.ndim < 3:
        return output, None
    fits = mask is not None and mask.shape == output.shape[:2]
    if not last_token_only:
        return output, mask if fits else None
    if last_is_real or not fits or mask is None:
        return output[:, -1], None
    last = mask.to(output.device).long().cumsum(1).argmax(1)  # [B]
    return output[torch.arange(output.shape[0], device=output.device), last], None


def _call(model: nn.Module, inputs: Any, *, keep_last: bool) -> Any:
    if not isinstance(inputs, Mapping):
        return model(inputs) if isinstance(inputs, torch.Tensor) else model(*inputs)
    options: dict[str, Any] = {}
    if isinstance(model, PreTrainedModel):
        accepted = inspect.signature(model.forward).parameters
        if "use_cache" in accepted:
            options["use_cache"] = False
        if keep_last and "logits_to_keep" in accepted and "labels" not in inputs:  # a loss takes all logits
            options["logits_to_keep"] = 1
    return model(**{**inputs, **options})


def _main_tensor(result: Any) -> torch.Tensor:
    """Logits, or the last hidden state, or the first floating-point tensor of a model's output."""
    if isinstance(result, torch.Tensor):
        return result
    fields: dict[Any, Any] = {}
    if isinstance(result, Mapping):
        fields = dict(result)
    elif isinstance(result, Iterable):
        fields = dict(enumerate(result))
    preferred = [fields.get("logits"), fields.get("last_hidden_state"), *fields.values()]
    for value in preferred:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    raise ValueError(
        f"the model returned a {type(result).__name__} without a tensor to probe; wrap it so that it returns its "
        "output tensor, or use importance='magnitude'"
    )
