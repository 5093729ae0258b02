"""The miniature as a subject of the benchmark: its base models, its data, its scores.

Pretraining seed 0 is the checkpoint inside the package, 1 and 2 are in ``BASE_MODELS``: the same weights wherever rows
are made. Others are looked for in ``CACHE/seed-N``, larger ones in ``CACHE/seed-N-SIZE``, and pretrained there on
demand (about 45 minutes on one core, longer in proportion to the parameters); a second process that wants the same one
waits.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from benchmarks.forgetting import pretrain
from benchmarks.forgetting.methods import Batch, Data
from dowser_peft.miniature import CHECKPOINT, DOWNSTREAM, UPSTREAM, evaluate, examples
from dowser_peft.miniature.training import batches_of, collate_prompts

BASE_MODELS = Path(__file__).parent / "base_models"
CACHE = Path.home() / ".cache" / "dowser-peft" / "miniature"
STEPS = {"rename": 300, "style": 100, "mirror": 300}  # the constant budget of each task
TASKS = list(DOWNSTREAM)
TEST, VALIDATION = 0, 1000  # seeds of the questions
PROBE_BATCH = 8


def checkpoint(pretraining_seed: int, cache: Path = CACHE, size: str | None = None) -> Path:
    """Folder of the base model; pretrains it if there is none yet."""
    name = _name(pretraining_seed, size)
    shipped = CHECKPOINT if name == "seed-0" else BASE_MODELS / name
    if shipped.exists():
        return shipped
    pretrain.pretrain(pretraining_seed, pretrain.STEPS, cache / name, pretrain.EVALUATE_EVERY, size)
    return cache / name


def _name(pretraining_seed: int, size: str | None) -> str:
    return f"seed-{pretraining_seed}" + (f"-{size}" if size else "")


def load_base(
    pretraining_seed: int, cache: Path = CACHE, size: str | None = None
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base model in float32 and evaluation mode, and its tokenizer."""
    folder = checkpoint(pretraining_seed, cache, size)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def upstream_questions(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[Batch]:
    """``count`` training questions of the old tasks in turn, unanswered; the tasks of a batch are all the same."""
    batches = []
    for index, task in enumerate(UPSTREAM):
        share = count // len(UPSTREAM) + (index < count % len(UPSTREAM))
        questions = examples(task, "train", share, seed)
        for start in range(0, share, PROBE_BATCH):
            batches.append(collate_prompts(tokenizer, questions[start : start + PROBE_BATCH]))
    return batches


def data_of(tokenizer: PreTrainedTokenizerBase, pretraining_seed: int, task: str, cache: Path | None = CACHE) -> Data:
    """What a method may read when it learns ``task``."""
    return Data(
        name=f"miniature-{pretraining_seed}/{task}",
        tokenizer=tokenizer,
        train=lambda steps, seed: batches_of(tokenizer, task, steps=steps, seed=seed),
        upstream=partial(upstream_questions, tokenizer),
        cache=cache,
    )


def score(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: str, items: int) -> dict[str, dict[str, float]]:
    """Accuracy in percent on every old task and on ``task``: ``items`` test and half as many validation questions."""
    tasks = [*UPSTREAM, task]
    return {
        "test": evaluate(model, tokenizer, tasks, items=items, seed=TEST),
        "validation": evaluate(model, tokenizer, tasks, items=max(1, items // 2), seed=VALIDATION),
    }
