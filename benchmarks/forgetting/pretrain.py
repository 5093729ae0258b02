"""Pretrain the miniature model from scratch: the script behind the embedded checkpoint.

    python -m benchmarks.forgetting.pretrain --seed 0 --out DIR
    python -m benchmarks.forgetting.pretrain --seed 0 --size 10M --out DIR    # a larger decoder

One recipe, one run. Every step sees single questions, about images and in words, each followed by
its answer and EOS, and documents: 64 tokens of questions and answers in words, one after another.
The loss is that of the answers plus a tenth of that of everything else. Documents and second term
make the model a language model of its whole small world, so that the long texts which it writes
from BOS (as Model-Dowser's probe has it do) mean something to it.

The weights are saved in bfloat16 and the final accuracies are those of the saved file. Batches
depend on the seed and the step only, so an interrupted run continues exactly from ``state.pt``. A
second process that wants the same model waits; one that is there is left as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from filelock import FileLock
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from benchmarks.forgetting import rows
from dowser_peft.miniature.model import HIDDEN_SIZE, build_model, build_tokenizer
from dowser_peft.miniature.tasks import BULLET, UPSTREAM, Example
from dowser_peft.miniature.training import IGNORED_LABEL, collate, evaluate
from dowser_peft.storage import write_text

RESULTS = Path(__file__).parent / "results" / "pretrain.jsonl"

# Relative frequency of each task. Digits are real images and few: they need much practice.
IMAGE_SHARES = {"digit": 5, "parity": 2, "shape": 4, "size": 1, "place": 1, "count": 2}
TEXT_SHARES = {
    "copy": 2,
    "reverse": 3,
    "sort": 1,
    "successor": 1,
    "larger": 2,
    "lives": 1,
    "eats": 1,
    "spanish": 1,
}
IMAGE_QUESTIONS = 40
TEXT_QUESTIONS = 16
DOCUMENTS = 8
DOCUMENT_TOKENS = 64
QUESTION_WEIGHT = 0.1
PEAK_LR = 2e-3  # falls with the width
WARMUP_STEPS = 200
STEPS = 3200
EVALUATE_EVERY = 500
SIZES: dict[str | None, dict[str, int]] = {  # arguments of build_model
    None: {},  # the embedded miniature, 3M
    "10M": {"hidden_size": 256, "intermediate_size": 704, "layers": 12},
}


def draw(shares: dict[str, int], count: int, rng: np.random.Generator) -> list[Example]:
    """``count`` training examples, tasks in proportion to ``shares``."""
    weights = np.array(list(shares.values()), dtype=float)
    names = rng.choice(list(shares), count, p=weights / weights.sum())
    return [UPSTREAM[name](rng, "train") for name in names]


def draw_questions(tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> dict[str, Tensor]:
    """A batch of single questions, about images and in words."""
    images = draw(IMAGE_SHARES, IMAGE_QUESTIONS, rng)
    return collate(tokenizer, images + draw(TEXT_SHARES, TEXT_QUESTIONS, rng))


def draw_documents(tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator) -> dict[str, Tensor]:
    """A batch of documents ``[DOCUMENTS, DOCUMENT_TOKENS]``: bulleted questions, cut off at the end."""
    bullet = tokenizer.convert_tokens_to_ids(BULLET)
    shape = (DOCUMENTS, DOCUMENT_TOKENS)
    input_ids = torch.full(shape, tokenizer.bos_token_id)
    labels = torch.full(shape, IGNORED_LABEL)
    for row in range(DOCUMENTS):
        end = 1
        while end < DOCUMENT_TOKENS:
            (example,) = draw(TEXT_SHARES, 1, rng)
            texts = tokenizer([example.question, example.answer], add_special_tokens=False)
            question, answer = texts["input_ids"]
            written = torch.tensor([bullet, *question, *answer])[: DOCUMENT_TOKENS - end]
            input_ids[row, end : end + len(written)] = written
            answered = end + 1 + len(question)
            end += len(written)
            labels[row, answered:end] = input_ids[row, answered:end]
    return {"input_ids": input_ids, "attention_mask": torch.ones(shape, dtype=torch.long), "labels": labels}


def language_loss(model: nn.Module, batch: dict[str, Tensor], image_token_id: int) -> Tensor:
    """Mean loss of the answer tokens plus a tenth of the mean loss of the question tokens."""
    labels = batch.pop("labels")
    logits = model(**batch).logits[:, :-1]  # [batch, tokens - 1, vocabulary]
    targets = batch["input_ids"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    answer = labels[:, 1:] != IGNORED_LABEL
    question = (batch["attention_mask"][:, 1:] == 1) & (targets != image_token_id) & ~answer
    return losses[answer].mean() + QUESTION_WEIGHT * losses[question].mean()


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def average(accuracy: dict[str, float]) -> float:
    """Mean accuracy over tasks."""
    return sum(accuracy.values()) / len(accuracy)


def pretrain(seed: int, steps: int, out: Path, evaluate_every: int, size: str | None = None) -> dict[str, object]:
    """Train, save the checkpoint to ``out``, and return its row of results, which is in ``pretraining.json``, too.

    Args:
        seed: of weights and data.
        steps: how many.
        out: folder of the checkpoint; if it is complete, nothing is done.
        evaluate_every: steps after which the state is kept.
        size: one of ``SIZES``.

    Raises:
        ValueError: if ``out`` has the state of a run with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = out / "pretraining.json"  # written last
    with FileLock(f"{out}.lock"):
        if not done.exists():
            row = _pretrain(seed, steps, out, evaluate_every, size)
            write_text(done, json.dumps(row) + "\n")
    found: dict[str, object] = json.loads(done.read_text())
    return found


def _pretrain(seed: int, steps: int, out: Path, evaluate_every: int, size: str | None) -> dict[str, object]:
    state_file = out / "state.pt"
    settings = {"seed": seed, "steps": steps, "size": size}
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, **SIZES[size]).train()
    peak = PEAK_LR * HIDDEN_SIZE / model.config.text_config.hidden_size
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    first, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        if state.get("settings") != settings:
            raise ValueError(
                f"{state_file} is of a run with {state.get('settings')}, not {settings}: remove it, or choose another "
                "folder"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds = state["step"], state["seconds"]

    started = time.perf_counter() - seconds
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="pretrain", mininterval=10)
    for step in bar:
        rng = np.random.default_rng([seed, step])
        loss = torch.zeros(())
        for draw_batch in (draw_questions, draw_documents):
            batch = draw_batch(tokenizer, rng)
            part = language_loss(model, batch, model.config.image_token_id)
            part.backward()
            loss += part.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % evaluate_every == 0:
            accuracy = evaluate(model, tokenizer, UPSTREAM, items=100, seed=1)
            model.train()
            tqdm.write(f"step {step + 1}: average {average(accuracy):.1f} {accuracy}")
            state = {
                "settings": settings,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "step": step + 1,
                "seconds": time.perf_counter() - started,
            }
            torch.save(state, partial := state_file.with_suffix(".partial"))
            partial.replace(state_file)
    minutes = (time.perf_counter() - started) / 60.0

    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    accuracy = evaluate(saved, AutoTokenizer.from_pretrained(out), UPSTREAM, items=400, seed=0)
    state_file.unlink(missing_ok=True)
    return {
        **settings,
        "minutes": round(minutes, 1),
        "parameters": sum(parameter.numel() for parameter in saved.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "items_per_task": 400,
        "average": round(average(accuracy), 2),
        "accuracy": accuracy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=[size for size in SIZES if size], help="of the decoder (default: 3M)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--evaluate-every", type=int, default=EVALUATE_EVERY)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    row = pretrain(arguments.seed, arguments.steps, arguments.out, arguments.evaluate_every, arguments.size)
    if row not in rows.read(RESULTS):
        rows.append([row], RESULTS)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
