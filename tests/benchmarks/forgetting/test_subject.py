"""The miniature as the benchmark sees it."""

from __future__ import annotations

import json
from threading import Thread

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.forgetting import miniature
from dowser_peft.miniature import CHECKPOINT, UPSTREAM
from dowser_peft.miniature.model import IMAGE_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_the_embedded_checkpoint_is_seed_zero(tmp_path):
    assert miniature.checkpoint(0, tmp_path) == CHECKPOINT
    assert not list(tmp_path.iterdir())


def test_other_seeds_are_pretrained_once(tmp_path, monkeypatch):
    made = []

    def pretrain(seed, steps, out, evaluate_every):
        made.append((seed, steps))
        return {"seed": seed}

    monkeypatch.setattr(miniature.pretrain, "pretrain", pretrain)
    threads = [Thread(target=miniature.checkpoint, args=(7, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [(7, miniature.pretrain.STEPS)]
    assert json.loads((tmp_path / "seed-7" / "pretraining.json").read_text()) == {"seed": 7}


def test_real_questions_are_of_all_old_tasks_and_unanswered(tokenizer):
    batches = miniature.upstream_questions(tokenizer, 64, seed=0)
    assert sum(len(batch["input_ids"]) for batch in batches) == 64
    with_image = sum(len(batch["pixel_values"]) for batch in batches if "pixel_values" in batch)
    image_tokens = sum(
        int((batch["input_ids"] == tokenizer.convert_tokens_to_ids("<image>")).sum()) for batch in batches
    )
    assert image_tokens == with_image * IMAGE_TOKENS
    assert 64 * 6 // 14 - 2 <= with_image <= 64 * 6 // 14 + 3  # six of fourteen tasks
    assert not any("labels" in batch for batch in batches)
    assert all(batch["attention_mask"][:, -1].all() for batch in batches)  # ends with the question
    assert len(UPSTREAM) == 14


def test_data_repeats_with_its_seed(tokenizer):
    data = miniature.data_of(tokenizer, 1, "style", None)
    assert data.name == "miniature-1/style"
    first, again, other = (list(data.train(2, seed)) for seed in (0, 0, 1))
    assert len(first) == 2 and len(first[0]["input_ids"]) == 16
    assert torch.equal(first[0]["pixel_values"], again[0]["pixel_values"])
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])
