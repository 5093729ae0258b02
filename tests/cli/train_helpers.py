"""What the tests of ``dowser-peft train`` share: flags of a short run, and data of four sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dowser_peft.cli import app
from tests.test_trl import ANSWERS, PROMPTS, images

FLAGS: dict[str, Any] = {"max_steps": 6, "num_prompts": 4, "num_probes": 2, "prompt_length": 8, "logging_steps": 1}


def as_flags(settings: dict[str, Any], **further: Any) -> list[Any]:
    return [part for name, value in (settings | further).items() for part in (f"--{name}", value)]


def run_in_process(*arguments: Any) -> dict[str, Any]:
    """``dowser-peft ... --json``, for fixtures that live longer than a test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_images(folder: Path) -> Path:
    folder.mkdir()
    for index, image in enumerate(images()):
        image.save(folder / f"{index}.png")
    return folder


def conversations() -> list[dict[str, Any]]:
    """Rows as in LLaVA's files."""
    return [
        {
            "image": f"{index}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}],
        }
        for index, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
