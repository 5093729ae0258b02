"""Batches, fine-tuning and exact-match evaluation, for a bare or a PEFT-wrapped model alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from dowser_peft.miniature.model import IMAGE, IMAGE_TOKENS
from dowser_peft.miniature.tasks import Example, examples

IGNORED_LABEL = -100  # what cross-entropy in torch and transformers skips


def _prompt(example: Example) -> str:
    """The question, behind one placeholder per image patch if there is an image."""
    if example.image is None:
        return example.question
    return " ".join([IMAGE] * IMAGE_TOKENS + [example.question])


def _pad(rows: list[list[int]], value: int, *, left: bool = False) -> Tensor:
    """Rows of different lengths as one ``[len(rows), longest]`` tensor."""
    longest = max(len(row) for row in rows)
    gaps = [[value] * (longest - len(row)) for row in rows]
    filled = [gap + row if left else row + gap for gap, row in zip(gaps, rows, strict=True)]
    return torch.tensor(filled)


def _pixels(batch: Sequence[Example]) -> dict[str, Tensor]:
    images = [example.image for example in batch if example.image is not None]
    return {"pixel_values": torch.from_numpy(np.stack(images))} if images else {}


def collate(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]) -> dict[str, Tensor]:
    """A training batch: questions and answers, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` ``[batch, tokens]``, and ``pixel_values``
        ``[images, 3, 32, 32]`` if any example has an image. Labels cover the answer and its EOS.
    """
    prompts = tokenizer([_prompt(example) for example in batch])["input_ids"]
    answers = tokenizer([example.answer for example in batch], add_special_tokens=False)
    endings = [ids + [tokenizer.eos_token_id] for ids in answers["input_ids"]]
    rows = [prompt + ending for prompt, ending in zip(prompts, endings, strict=True)]
    labels = [[IGNORED_LABEL] * len(prompt) + ending for prompt, ending in zip(prompts, endings, strict=True)]
    return {
        "input_ids": _pad(rows, tokenizer.pad_token_id),
        "attention_mask": _pad([[1] * len(row) for row in rows], 0),
        "labels": _pad(labels, IGNORED_LABEL),
        **_pixels(batch),
    }


def collate_prompts(tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]) -> dict[str, Tensor]:
    """A generation batch: questions alone, padded on the left; shapes as in ``collate``."""
    prompts = tokenizer([_prompt(example) for example in batch])["input_ids"]
    return {
        "input_ids": _pad(prompts, tokenizer.pad_token_id, left=True),
        "attention_mask": _pad([[1] * len(row) for row in prompts], 0, left=True),
        **_pixels(batch),
    }


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite: the learning rate is too high for this method."""


@dataclass(frozen=True)
class Recipe:
    """How :func:`train` goes beyond its learning rate; the defaults are those of the miniature.

    Args:
        schedule: how the learning rate falls to zero behind the warm-up.
        warmup: share of the steps in which the learning rate rises linearly from zero.
        accumulation: batches whose gradients make one step; their losses are averaged.
        bfloat16: run the model under autocast, so that weights that train in float32 compute in bfloat16.
        accelerate: train where, and on as many devices, as ``accelerate launch`` says. Every process gives
            ``train`` batches of its own; gradients are averaged over the processes.
        weight_decay: of AdamW, decoupled; it draws the values of an adapter to zero, that is to the base model, and
            the weights of full fine-tuning to zero.
    """

    schedule: Literal["linear", "cosine"] = "linear"
    warmup: float = 0.0
    accumulation: int = 1
    bfloat16: bool = False
    accelerate: bool = False
    weight_decay: float = 0.0


def train(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    steps: int,
    lr: float,
    recipe: Recipe = Recipe(),  # noqa: B008  frozen
    after_step: Callable[[], None] | None = None,
    progress: str | None = None,
) -> list[float]:
    """Train whatever ``requires_grad`` on ``batches``, of which there must be ``steps * recipe.accumulation``.

    The recipe is the default of transformers' Trainer: AdamW, gradients clipped at norm 1, and, if ``recipe`` does not
    say otherwise, no weight decay and the learning rate falling linearly to zero.

    Args:
        model: bare or wrapped; in evaluation mode afterwards.
        batches: keyword arguments of ``model``, with ``labels``.
        steps: optimizer steps.
        lr: the highest learning rate: that of the first step, or at the end of the warm-up.
        recipe: everything else.
        after_step: called after every optimizer step, while the clipped gradients are still there.
        progress: label of a progress bar; without it there is one only under ``recipe.accelerate``.

    Returns:
        The loss of every step.

    Raises:
        NonFiniteLossError: naming the step; in all processes alike.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accelerator = join_processes() if recipe.accelerate else None
    wrapped = model if accelerator is None else accelerator.prepare_model(model)
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=recipe.weight_decay)
    schedule = _schedule(optimizer, recipe, steps)
    device = trainable[0].device
    losses = []
    model.train()
    source = iter(batches)
    quiet = progress is None if accelerator is None else not accelerator.is_main_process
    for step in (bar := tqdm(range(steps), desc=progress or "train", disable=quiet)):
        loss = torch.zeros((), device=device)
        for left, batch in _counted_down(list(islice(source, recipe.accumulation))):
            # Gradients travel between the processes with the last batch of a step only.
            with accelerator.no_sync(wrapped) if accelerator is not None and left else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bfloat16):
                    part = wrapped(**send_to_device(batch, device)).loss / recipe.accumulation
                part.backward()
            loss += part.detach()
        losses.append((loss if accelerator is None else accelerator.reduce(loss, "mean")).item())
        if not math.isfinite(losses[-1]):
            raise NonFiniteLossError(f"the loss became {losses[-1]} at step {step + 1} of {steps} with lr={lr:g}")
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def _counted_down(batches: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each batch with the number of those that are still to come."""
    return zip(reversed(range(len(batches))), batches, strict=True)


def join_processes() -> Accelerator:
    """This process as one of those that ``accelerate launch`` started, each with the whole model; the same every time.

    Raises:
        ValueError: if ``accelerate launch`` was told to split the model, which no method here expects.
    """
    # Masks never change: sending them in every step would be a waste.
    found = Accelerator(mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    if found.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"):
        raise ValueError(
            f"accelerate was set up for {found.distributed_type.value}: methods here need the whole model in every "
            "process. Use plain data parallelism (accelerate launch --multi_gpu)"
        )
    return found


def _schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "linear" and not recipe.warmup:
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    make = get_cosine_schedule_with_warmup if recipe.schedule == "cosine" else get_linear_schedule_with_warmup
    return make(optimizer, math.ceil(recipe.warmup * steps), steps)


def batches_of(
    tokenizer: PreTrainedTokenizerBase, task: str, *, steps: int, batch_size: int = 16, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """``steps`` training batches of ``task``; no example comes twice."""
    data = examples(task, "train", steps * batch_size, seed)
    for step in range(steps):
        yield collate(tokenizer, data[step * batch_size : (step + 1) * batch_size])


def fine_tune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    steps: int,
    lr: float,
    batch_size: int = 16,
    seed: int = 0,
    weight_decay: float = 0.0,
    progress: bool = False,
) -> list[float]:
    """Train whatever ``requires_grad`` on fresh batches of ``task``, as :func:`train` does.

    Returns:
        The loss of every step.
    """
    batches = batches_of(tokenizer, task, steps=steps, batch_size=batch_size, seed=seed)
    recipe = Recipe(weight_decay=weight_decay)
    return train(model, batches, steps=steps, lr=lr, recipe=recipe, progress=task if progress else None)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str],
    *,
    items: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """Percentage of held-out questions of each task that greedy decoding answers exactly."""
    device = next(model.parameters()).device
    model.eval()
    accuracy = {}
    for task in tasks:
        data = examples(task, "test", items, seed)
        answers = tokenizer([example.answer for example in data], add_special_tokens=False)
        wanted = [ids + [tokenizer.eos_token_id] for ids in answers["input_ids"]]
        longest = max(len(ids) for ids in wanted)
        batch = send_to_device(collate_prompts(tokenizer, data), device)
        output = model.generate(**batch, do_sample=False, max_new_tokens=longest)  # type: ignore[operator]
        written = output[:, batch["input_ids"].shape[1] :].tolist()
        right = [row[: len(ids)] == ids for row, ids in zip(written, wanted, strict=True)]
        accuracy[task] = 100.0 * sum(right) / items
    return accuracy
