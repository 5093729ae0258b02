"""``dowser-peft export`` and ``dowser-peft import``: to PEFT's SHiRA and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.cli.test_merge import TOKENS


def _answer(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_there_and_back(dowser_json, tmp_path, llama, llama_adapter):
    shira, back = tmp_path / "new" / "shira", tmp_path / "back"
    result = dowser_json("export", llama_adapter, "-o", shira)
    assert result["format"] == "shira" and result["base"] == str(llama)
    assert result["file_bytes"] == (shira / "adapter_model.safetensors").stat().st_size
    assert json.loads((shira / "adapter_config.json").read_text())["peft_type"] == "SHIRA"
    assert torch.equal(_answer(llama, shira), _answer(llama, llama_adapter))
    assert [path.name for path in shira.parent.iterdir()] == ["shira"]

    imported = dowser_json("import", shira, "-o", back)
    original, found = (load_file(folder / "adapter_model.safetensors") for folder in (llama_adapter, back))
    assert original.keys() == found.keys() and all(torch.equal(original[key], found[key]) for key in original)
    trained = sum(tensor.numel() for key, tensor in found.items() if key.endswith("values"))
    assert imported["trained"] == result["trained"] == trained


def test_an_adapter_of_peft_takes_the_weights_of_its_base(dowser_json, tmp_path, llama):
    from peft import ShiraConfig

    base = AutoModelForCausalLM.from_pretrained(llama)
    model = get_peft_model(base, ShiraConfig(r=1, target_modules=["q_proj"], init_weights=False))
    model.save_pretrained(str(tmp_path / "shira"))
    dowser_json("import", tmp_path / "shira", "-o", tmp_path / "back")
    assert torch.equal(_answer(llama, tmp_path / "back"), _answer(llama, tmp_path / "shira"))
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["base_fingerprint"]


def test_summary_for_people(dowser, tmp_path, llama_adapter):
    result = dowser("export", llama_adapter, "-o", tmp_path / "shira", "--format", "shira")
    assert result.exit_code == 0 and "PeftModel.from_pretrained" in result.stdout and result.stderr == ""
    result = dowser("import", tmp_path / "shira", "-o", tmp_path / "back")
    assert result.exit_code == 0 and "Imported" in result.stdout


def test_errors_say_what_to_do(dowser, tmp_path, llama, llama_adapter):
    cases = [
        (("export", llama_adapter, "--format", "supertuning"), "--format must be one of shira"),
        (("export", llama), "holds no adapter"),
        (("import", llama_adapter), "of the method DOWSER; this command is for SHIRA adapters"),
    ]
    for arguments, message in cases:
        result = dowser(*arguments, "-o", tmp_path / "out")
        assert result.exit_code == 1 and message in result.stderr
        assert not (tmp_path / "out").exists()


def test_force_replaces_an_adapter_and_nothing_else(dowser, dowser_json, tmp_path, llama, llama_adapter, monkeypatch):
    output = tmp_path / "out"
    dowser_json("export", llama_adapter, "-o", output)
    result = dowser("export", llama_adapter, "-o", output)
    assert result.exit_code == 1 and "--force" in result.stderr
    (output / "old").write_text("")
    dowser_json("export", llama_adapter, "-o", output, "--force")
    assert not (output / "old").exists()
    for folder in (shutil.copytree(llama, tmp_path / "model"), llama_adapter):
        result = dowser("export", llama_adapter, "-o", folder, "--force")
        assert result.exit_code == 1 and ("no adapter that" in result.stderr or "would replace" in result.stderr)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("dowser_peft.exchange.write_safetensors", fail)
    before = (output / "adapter_model.safetensors").read_bytes()
    assert dowser("export", llama_adapter, "-o", output, "--force").exit_code == 1
    assert (output / "adapter_model.safetensors").read_bytes() == before
