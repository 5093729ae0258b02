"""transformers' Trainer: what README's table "works with" says about it.

Each run is some steps of a tiny model. TRL's trainers are in test_trl.py, plain resuming in test_trainer.py.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from dowser_peft import DowserConfig, importance
from tests.models import tiny_llama
from tests.test_model import QUICK, dowser_layers

ROOT = Path(__file__).parent.parent
LEARNING_RATE = 1e-2


def rows(count: int = 32, seed: int = 3) -> list[dict[str, list[int]]]:
    ids = torch.randint(6, 96, (count, 8), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def adapted(**options: Any) -> PeftModel:
    """The model with an adapter whose values are not zero, as if it had been trained before."""
    model = get_peft_model(tiny_llama(**options), DowserConfig(**QUICK))
    generator = torch.Generator().manual_seed(4)
    for layer in dowser_layers(model).values():
        values = layer.dowser_values["default"]
        values.data = 0.1 * torch.randn(values.shape, generator=generator)
    return model


def trainer_of(model: nn.Module, folder: Path, data: Any = None, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    evaluation, callbacks = options.pop("eval_dataset", None), options.pop("callbacks", None)
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments | options),
        train_dataset=rows() if data is None else data,
        eval_dataset=evaluation,
        data_collator=default_data_collator,
        callbacks=callbacks,
    )


def train(model: nn.Module, folder: Path, data: Any = None, **options: Any) -> list[float]:
    """Train; the loss of every step."""
    trainer = trainer_of(model, folder, data, **options)
    trainer.train()
    return logged(trainer, "loss")


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def values(model: nn.Module) -> torch.Tensor:
    """All trained values, as one vector."""
    return torch.cat([layer.dowser_values["default"].detach() for layer in dowser_layers(model).values()])


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def test_only_the_values_train_and_stay_float32_over_a_bfloat16_base(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama().bfloat16(), DowserConfig(**QUICK))
    before = frozen(model)
    losses = train(model, tmp_path, rows(4), max_steps=8)
    assert losses[-1] < losses[0]
    assert values(model).dtype == torch.float32
    after = frozen(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_gradient_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    whole, accumulated = adapted(), adapted()
    expected = train(whole, tmp_path, per_device_train_batch_size=8, optim="sgd")
    found = train(accumulated, tmp_path, gradient_accumulation_steps=2, optim="sgd")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(values(accumulated), values(whole))


def test_gradient_clipping_bounds_the_step(tmp_path: Path) -> None:
    model = adapted()
    start = values(model)
    trainer = trainer_of(model, tmp_path, max_steps=1, max_grad_norm=1e-3, optim="sgd", learning_rate=1.0)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 1e-3
    torch.testing.assert_close((values(model) - start).norm().item(), 1e-3, rtol=1e-3, atol=0)


def test_weight_decay_pulls_the_delta_to_zero_and_leaves_the_base(tmp_path: Path) -> None:
    plain, decayed = adapted(), adapted()
    start, base = values(plain), frozen(decayed)
    train(plain, tmp_path, max_steps=1)
    train(decayed, tmp_path, max_steps=1, weight_decay=0.5)
    torch.testing.assert_close(values(decayed) - values(plain), -LEARNING_RATE * 0.5 * start, rtol=1e-3, atol=1e-7)
    assert all(torch.equal(p, base[name]) for name, p in frozen(decayed).items())


def test_cosine_schedule_with_warmup(tmp_path: Path) -> None:
    trainer = trainer_of(adapted(), tmp_path, lr_scheduler_type="cosine", warmup_steps=2)
    trainer.train()
    expected = [0.0, 0.5, *(0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4))]
    assert logged(trainer, "learning_rate") == pytest.approx([LEARNING_RATE * rate for rate in expected])


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
def test_gradient_checkpointing_changes_nothing(bf16: bool, tmp_path: Path) -> None:
    """Re-entrant or not, with and without mixed precision."""
    runs = []
    for checkpointing in ({}, {"use_reentrant": True}, {"use_reentrant": False}):
        model = adapted(attention_dropout=0.1)
        options = {"gradient_checkpointing": bool(checkpointing), "gradient_checkpointing_kwargs": checkpointing}
        losses = train(model, tmp_path, bf16=bf16, **options)
        runs.append((losses, values(model)))
        assert values(model).dtype == torch.float32
    for losses, found in runs[1:]:
        assert losses == runs[0][0]
        assert torch.equal(found, runs[0][1])


def test_bf16_autocast_computes_in_bfloat16(tmp_path: Path) -> None:
    plain, mixed = train(adapted(), tmp_path), train(adapted(), tmp_path, bf16=True)
    assert plain != mixed
    assert mixed == pytest.approx(plain, rel=2e-2)


class DerailAfter(TrainerCallback):
    """From a step on, the values are far off."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == self.step + 1:
            for layer in dowser_layers(model).values():
                layer.dowser_values["default"].data += 1.0


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = adapted()
    trainer = trainer_of(
        model,
        tmp_path,
        rows(4),
        eval_dataset=rows(4),
        callbacks=[DerailAfter(3)],
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = trainer.state.best_model_checkpoint
    assert best is not None and best.endswith("checkpoint-3")
    saved = load_file(Path(best) / "adapter_model.safetensors")
    for name, layer in dowser_layers(model).items():
        assert torch.equal(layer.dowser_values["default"], saved[f"{name}.dowser_values"])
    assert trainer.evaluate()["eval_loss"] == min(losses)


def test_streaming_dataset(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    options = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    stream = load_dataset("json", data_files=str(file), streaming=True, **options)
    listed, streamed = adapted(), adapted()
    assert train(streamed, tmp_path, stream) == train(listed, tmp_path)
    assert torch.equal(values(streamed), values(listed))


class KillMidway(TrainerCallback):
    """kill -9 in the middle of a step, between two batches of gradient accumulation."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


# Everything that a resumed run has to restore: shuffled data, dropout, a schedule, AdamW's states.
RESUMABLE: dict[str, Any] = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "train_sampling_strategy": "random",
}


def killed_run(folder: str) -> None:
    """What the killed process runs."""
    train(adapted(attention_dropout=0.1), Path(folder), callbacks=[KillMidway()], **RESUMABLE)


def test_resuming_after_kill_9_equals_an_uninterrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; from tests import test_training_stacks as stacks; stacks.killed_run(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    whole = adapted(attention_dropout=0.1)
    expected = train(whole, tmp_path / "whole", **RESUMABLE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors.decode()

    checkpoint = get_last_checkpoint(str(tmp_path / "killed"))
    assert checkpoint is not None and checkpoint.endswith("checkpoint-4")
    monkeypatch.setattr(importance, "probe", lambda *a, **k: pytest.fail("probed again"))
    resumed = PeftModel.from_pretrained(tiny_llama(attention_dropout=0.1), checkpoint, is_trainable=True)
    trainer = trainer_of(resumed, tmp_path / "killed", **RESUMABLE)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert logged(trainer, "loss") == expected
    assert torch.equal(values(resumed), values(whole))
