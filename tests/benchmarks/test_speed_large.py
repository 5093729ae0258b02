"""Large models on small machines: the benchmark's run in small, and selection over offloaded weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from peft import get_peft_model

from benchmarks.speed import large
from dowser_peft import DowserConfig, importance
from dowser_peft.targets import default_targets
from tests.models import tiny_llama


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA's classes in a small shape."""
    text = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 32064}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}

    def model_config(name: str) -> transformers.PretrainedConfig:
        assert name == "llava-1.5-7b"
        return transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        )

    monkeypatch.setattr(large, "model_config", model_config)


def run_main(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> dict[str, Any]:
    small = ["--layers", "3", "--num-prompts", "2", "--prompt-length", "8", "--tokens", "16"]
    monkeypatch.setattr("sys.argv", ["large", *small, *arguments, "--out", str(out)])
    large.main()
    return json.loads(out.read_text())


@pytest.mark.usefixtures("small_shape")
def test_all_phases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = run_main(monkeypatch, tmp_path / "rows.jsonl")
    assert [phase["phase"] for phase in row["phases"]] == ["build", "probe", "select", "adapt", "step"]
    assert row["error"] is None and row["within_limit"]
    assert row["target_modules"] == 3 * 7
    assert row["mask_bytes"] == 3 * (4 * 64 * 64 + 3 * 64 * 96) // 8
    assert 0 < row["loss"] < 2 * torch.tensor(32064.0).log()
    assert all(phase["peak_rss_bytes"] >= phase["rss_bytes"] > 0 for phase in row["phases"])


@pytest.mark.usefixtures("small_shape")
def test_a_failed_phase_still_writes_its_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(large, "select_masks", fails)
    with pytest.raises(SystemExit, match="select: MemoryError: no room"):
        run_main(monkeypatch, tmp_path / "rows.jsonl")
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["error"] == "select: MemoryError: no room" and not row["within_limit"]
    assert [phase["phase"] for phase in row["phases"]] == ["build", "probe", "select"]
    assert row["loss"] is None and row["weight_bytes"] > 0


@pytest.mark.usefixtures("small_shape")
def test_random_weights_are_those_of_a_usable_model() -> None:
    model = large.random_llava(2)
    weight = model.get_submodule("model.language_model.layers.0.mlp.up_proj").weight
    assert weight.dtype == torch.bfloat16 and 0.015 < float(weight.std()) < 0.025
    assert len({tuple(row) for row in weight.tolist()}) == weight.shape[0]
    assert all(parameter.device.type == "cpu" and not parameter.requires_grad for parameter in model.parameters())
    logits = model(input_ids=torch.arange(3, 19)[None]).logits
    assert bool(torch.isfinite(logits).all()) and float(logits.std()) > 0


def test_reset_peak() -> None:
    block = torch.ones(1 << 26)  # 256 MB
    high = large.memory("VmHWM")
    del block
    large.reset_peak()
    assert large.memory("VmHWM") < high - 2e8


@pytest.mark.parametrize("method", ["dowser", "magnitude"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_selected_one_at_a_time(
    method: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def config() -> DowserConfig:
        return DowserConfig(rho=0.1, importance=method, num_prompts=2, num_probes=1, prompt_length=8)

    expected = get_peft_model(tiny_llama(), config())
    model: Any = tiny_llama()
    offload: Callable[..., Any] = accelerate.cpu_offload if where == "cpu" else accelerate.disk_offload
    offload(model, *([] if where == "cpu" else [tmp_path]), execution_device=torch.device("cpu"))
    targets = [model.get_submodule(name) for name in default_targets(model)]
    every = [module for module in model.modules() if module._parameters]
    at_hand: list[int] = []
    score = importance.bottom_rho_mask

    def watched(*args: Any) -> torch.Tensor:
        at_hand.append(sum(w.device.type != "meta" for m in every for w in m._parameters.values() if w is not None))
        return score(*args)

    monkeypatch.setattr(importance, "bottom_rho_mask", watched)
    adapted = get_peft_model(model, config())
    assert at_hand == [1] * len(targets)  # parameters in memory, of the whole model, at each selection
    assert all(module.weight.device.type == "meta" for module in targets)
    masks = {name: mask for name, mask in adapted.named_buffers() if "dowser_mask" in name}
    for name, mask in expected.named_buffers():
        if "dowser_mask" in name:
            assert torch.equal(mask, masks[name]), name

    ids = torch.arange(6, 22)[None]
    loss, loss_in_memory = (m(input_ids=ids, labels=ids).loss for m in (adapted, expected))
    loss.backward()
    loss_in_memory.backward()
    assert torch.equal(loss, loss_in_memory)
    assert all(module.weight.device.type == "meta" for module in targets)
    in_memory = dict(expected.named_parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, in_memory[name].grad)
