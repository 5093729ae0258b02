"""What a probe refuses, in words: modules that were not called, padding, NaN and inf, prompts that do not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dowser_peft.probing.forward import Batch, generates, probed_output, ready_inputs, token_masks
from dowser_peft.probing.hooks import NeedsSinglePromptsError, StatisticsHooks, first_non_finite, is_expert

OUTPUT = "the output of the model, though of no target module,"


def check_called(modules: dict[str, Any], hooks: StatisticsHooks) -> None:
    """Synthetic prompts call the same modules each time; of data, only all batches together tell."""
    missing = [name for name in modules if name not in hooks.input_groups and not is_expert(name)]
    if missing:
        raise ValueError(
            f"the target module {missing[0]!r} was not called in the forward pass, so it cannot be scored. "
            "Leave it out (exclude_modules), probe with data that uses it, probe(model, batches=...), "
            "or use importance='magnitude'"
        )


def check_padding(model: nn.Module, hooks: StatisticsHooks, masks: dict[str, torch.Tensor]) -> None:
    """Some models lengthen what they are given (image features between the tokens); their mask then fits nothing."""
    mask = masks.get("source")
    if mask is None or "target" in masks or not generates(model) or bool(mask.all()):
        return
    if hooks.prompt_lengths and mask.shape[1] not in hooks.prompt_lengths:
        raise ValueError(
            f"the attention_mask is of {mask.shape[1]} tokens, but the target modules see "
            f"{max(hooks.prompt_lengths)}: padding cannot be told from tokens. Pass batches of one prompt each, "
            "without padding"
        )


def not_finite(where: str) -> ValueError:
    return ValueError(
        f"{where} holds NaN or inf while probing: check the weights up to there, or load the model in a wider dtype "
        "(bfloat16 or float32 instead of float16)"
    )


def cannot_split(error: Exception) -> Exception:
    if isinstance(error, NeedsSinglePromptsError):
        return ValueError(
            "a target module mixes the tokens of several prompts (routed experts do), so that they cannot be "
            "told apart: pass batches of one prompt each"
        )
    return torch.OutOfMemoryError(
        f"{error}. A probe keeps the activations of at least one prompt: use shorter prompts (prompt_length or "
        "batches), or load the model in 4 bits or on a larger device"
    )


def first_failure(model: nn.Module, modules: dict[str, Any], hooks: StatisticsHooks, batch: Batch) -> str | None:
    """Where the first NaN or inf comes up in a forward pass; None if the backward passes bring it up."""
    inputs = ready_inputs(model, batch.inputs)
    masks = token_masks(model, inputs)
    hooks.start_batch(batch.num_prompts, masks)  # they are still in place
    with first_non_finite(modules) as found, torch.no_grad():
        output, _ = probed_output(model, inputs, masks)
    if found:
        return found[0]
    return None if bool(torch.isfinite(output).all()) else OUTPUT
