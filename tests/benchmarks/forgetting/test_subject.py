"""The miniature as the benchmark sees it."""

from __future__ import annotations

import json
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.forgetting import miniature
from benchmarks.forgetting.protocol import ITEMS
from dowser_peft.miniature import CHECKPOINT, TASKS, UPSTREAM, examples
from dowser_peft.miniature.model import IMAGE_TOKENS, build_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_the_embedded_checkpoint_is_seed_zero(tmp_path):
    assert miniature.checkpoint(0, tmp_path) == CHECKPOINT
    assert not list(tmp_path.iterdir())


def test_other_seeds_are_pretrained_once(tmp_path, monkeypatch):
    made = []

    def pretrain(seed, steps, out, evaluate_every, size):
        made.append((seed, steps, size))
        return {"seed": seed}

    monkeypatch.setattr(miniature.pretrain, "_pretrain", pretrain)
    threads = [Thread(target=miniature.checkpoint, args=(7, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [(7, miniature.pretrain.STEPS, None)]
    assert json.loads((tmp_path / "seed-7" / "pretraining.json").read_text()) == {"seed": 7}
    assert miniature.checkpoint(0, tmp_path, "10M") == tmp_path / "seed-0-10M"
    assert made[1:] == [(0, miniature.pretrain.STEPS, "10M")]


@pytest.fixture
def tiny_pretraining(monkeypatch):
    """Pretraining of a decoder of one narrow layer, which answers no questions."""
    monkeypatch.setitem(miniature.pretrain.SIZES, "tiny", {"hidden_size": 32, "intermediate_size": 16, "layers": 1})
    monkeypatch.setattr(miniature.pretrain, "evaluate", lambda *arguments, **options: {"digit": 50.0})

    def pretrain(out):
        return miniature.pretrain.pretrain(3, 3, out, evaluate_every=1, size="tiny")

    return pretrain


def test_interrupted_pretraining_goes_on_exactly(tmp_path, monkeypatch, tiny_pretraining):
    whole = tiny_pretraining(tmp_path / "whole")
    loss = miniature.pretrain.language_loss
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:  # two of each step
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(miniature.pretrain, "language_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny_pretraining(tmp_path / "parts")
    parts = tiny_pretraining(tmp_path / "parts")
    assert {**parts, "minutes": 0} == {**whole, "minutes": 0}
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(tmp_path.glob("*/state.*"))


def test_the_state_of_another_pretraining_is_refused(tmp_path, tiny_pretraining):
    torch.save({"settings": {"seed": 3, "steps": 9, "size": None}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt is of a run with .*'steps': 9.* not .*'steps': 3"):
        tiny_pretraining(tmp_path)


@pytest.mark.parametrize(("size", "parameters"), [(None, 3_116_320), ("10M", 10_367_488)])
def test_the_sizes_of_base_models(tokenizer, size, parameters):
    with torch.device("meta"):
        model = build_model(tokenizer, **miniature.pretrain.SIZES[size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.text_config.head_dim == 32


def test_a_larger_base_is_that_of_its_size(tmp_path, tokenizer):
    folder = tmp_path / "seed-3-10M"
    build_model(tokenizer, hidden_size=32, intermediate_size=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "pretraining.json").write_text("{}")
    model, _ = miniature.load_base(3, tmp_path, "10M")
    assert model.config.text_config.hidden_size == 32
    assert model.dtype == torch.float32 and not model.training


def test_what_validation_and_test_questions_share():
    """As protocol.py says."""

    def told(example):
        return example.question, example.answer, None if example.image is None else example.image.tobytes()

    shared = {}
    for task in TASKS:
        test = {told(example) for example in examples(task, "test", ITEMS, miniature.TEST)}
        validation = [told(example) for example in examples(task, "test", ITEMS // 2, miniature.VALIDATION)]
        shared[task] = sum(question in test for question in validation) / len(validation)
        if task in ("lives", "eats", "spanish"):
            assert len(test) == 30 and shared[task] == 1
    partly = ("successor", "mirror", "digit", "parity", "sort", "larger")
    assert min(shared[task] for task in partly) == 0.15 and max(shared[task] for task in partly) == 0.64
    others = set(TASKS) - {"lives", "eats", "spanish", *partly}
    assert len(others) == 8 and not any(shared[task] for task in others)


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
