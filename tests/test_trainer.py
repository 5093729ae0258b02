"""transformers' Trainer: what README says about resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from dowser_peft import DowserConfig, importance
from tests.models import tiny_llama
from tests.test_model import QUICK, dowser_layers

DATA = [{"input_ids": row, "labels": row} for row in torch.randint(6, 96, (32, 8))]


def train(model: nn.Module, folder: Path, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=DATA)
    trainer.train(**options)
    return trainer


def values(model: nn.Module) -> list[torch.Tensor]:
    return [layer.dowser_values["default"].detach().clone() for layer in dowser_layers(model).values()]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(**QUICK))
    start = values(model)
    train(model, tmp_path / "whole", 6)
    whole = values(model)
    assert not all(torch.equal(a, b) for a, b in zip(start, whole, strict=True))

    train(get_peft_model(tiny_llama(), DowserConfig(**QUICK)), tmp_path / "cut", 3)
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    monkeypatch.setattr(importance, "probe", lambda *a, **k: pytest.fail("probed again"))
    resumed = PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    train(resumed, tmp_path / "cut", 6, resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(whole, values(resumed), strict=True))
