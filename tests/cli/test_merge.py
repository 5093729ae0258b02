"""``dowser-peft merge``: an ordinary model that answers exactly as the adapted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from dowser_peft.cli import merge as merge_module
from dowser_peft.cli.models import Source, load_model
from tests import models
from tests.cli.conftest import trained_adapter

TOKENS = torch.tensor([[1, 7, 8, 9, 30]])


def _inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "llama":
        return {"input_ids": TOKENS}
    image = torch.full((1, 4), models.IMAGE)  # 8 x 8 pixels in patches of 4
    return {"input_ids": torch.cat([TOKENS, image], 1), "pixel_values": torch.randn(1, 3, 8, 8)}


@torch.no_grad()
def _answer(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits


@pytest.mark.parametrize(("name", "auto"), [("llama", AutoModelForCausalLM), ("llava", AutoModelForImageTextToText)])
def test_merged_model_answers_bit_for_bit_as_the_adapter(dowser_json, tmp_path, request, name, auto):
    base, adapter = request.getfixturevalue(name), request.getfixturevalue(f"{name}_adapter")
    output = tmp_path / "new" / "merged"
    result = dowser_json("merge", adapter, "-o", output)
    inputs = _inputs(name)
    merged, original = auto.from_pretrained(output), auto.from_pretrained(base)
    assert type(merged) is type(original) and merged.dtype == original.dtype
    assert not torch.equal(_answer(merged, inputs), _answer(original, inputs))
    adapted = PeftModel.from_pretrained(original, str(adapter))
    assert torch.equal(_answer(merged, inputs), _answer(adapted, inputs))
    assert AutoTokenizer.from_pretrained(output)("w7 w8")["input_ids"] == [7, 8]
    assert not list(output.glob("adapter*")) and [path.name for path in output.parent.iterdir()] == ["merged"]
    assert result["model_class"] == type(merged).__name__
    assert result["weights"] == ["model.safetensors"]
    assert result["file_bytes"] == (output / "model.safetensors").stat().st_size
    assert result["trained"] == sum(p.numel() for n, p in adapted.named_parameters() if ".dowser_values." in n)
    assert ("preprocessor_config.json" in result["copied"]) == (name == "llava")
    assert all((output / file).is_file() for file in result["copied"])


def test_merge_of_fused_experts(dowser_json, tmp_path):
    base = tmp_path / "base"
    models.tiny_mixtral().bfloat16().save_pretrained(base)
    adapter = trained_adapter(base, tmp_path / "adapter")
    dowser_json("merge", adapter, "-o", tmp_path / "merged")
    merged, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", base))
    assert not torch.equal(_answer(merged, {"input_ids": TOKENS}), _answer(original, {"input_ids": TOKENS}))
    adapted = PeftModel.from_pretrained(original, str(adapter))
    assert torch.equal(_answer(merged, {"input_ids": TOKENS}), _answer(adapted, {"input_ids": TOKENS}))


def test_dtype(dowser_json, tmp_path, llama, llama_adapter):
    result = dowser_json("merge", llama_adapter, "-o", tmp_path / "m", "--dtype", "float32")
    assert result["dtype"] == "float32"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.dtype == torch.float32
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama, dtype="float32"), str(llama_adapter)
    )
    assert torch.equal(_answer(merged, _inputs("llama")), _answer(adapted, _inputs("llama")))


def test_shards(dowser_json, dowser, tmp_path, llama, llama_adapter):
    result = dowser_json("merge", llama_adapter, "-o", tmp_path / "m", "--max-shard-size", "5KB")
    assert len(result["weights"]) > 1 and (tmp_path / "m" / "model.safetensors.index.json").is_file()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(llama_adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(_answer(merged, _inputs("llama")), _answer(adapted, _inputs("llama")))
    wrong = dowser("merge", llama_adapter, "-o", tmp_path / "n", "--max-shard-size", "big")
    assert wrong.exit_code == 1 and "big" in wrong.stderr and not (tmp_path / "n").exists()


def test_summary_for_people(dowser, tmp_path, llama, llama_adapter):
    result = dowser("merge", llama_adapter, "-o", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM, bfloat16" in result.stdout and "tokenizer.json" in result.stdout
    assert result.stderr == ""


def test_modules_saved_in_full_are_merged(dowser_json, tmp_path, llama):
    adapter = trained_adapter(llama, tmp_path / "adapter", modules_to_save=["lm_head"])
    dowser_json("merge", adapter, "-o", tmp_path / "m")
    merged, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "m", llama))
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)
    adapted = PeftModel.from_pretrained(base, str(adapter))
    assert torch.equal(_answer(merged, _inputs("llama")), _answer(adapted, _inputs("llama")))


def test_tokenizer_of_the_adapter_goes_before_that_of_the_base(dowser_json, tmp_path, llava, llava_adapter):
    adapter = Path(shutil.copytree(llava_adapter, tmp_path / "adapter"))
    for file in llava.glob("tokenizer*"):
        shutil.copy(file, adapter)
    (adapter / "chat_template.jinja").write_text("new template")
    (llava / "added_tokens.json").write_text("{}")
    try:
        dowser_json("merge", adapter, "-o", tmp_path / "m")
    finally:
        (llava / "added_tokens.json").unlink()
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == "new template"
    assert not (tmp_path / "m" / "added_tokens.json").exists()  # would mix two tokenizers
    assert (tmp_path / "m" / "preprocessor_config.json").exists()


def test_base_option_replaces_what_the_adapter_says(dowser, dowser_json, tmp_path, llama, llama_adapter):
    adapter = Path(shutil.copytree(llama_adapter, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for recorded, message in ((None, "does not say which model"), ("/gone", "no model folder at '/gone'")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": recorded}))
        result = dowser("merge", adapter, "-o", tmp_path / "m")
        assert result.exit_code == 1 and message in result.stderr
    dowser_json("merge", adapter, "-o", tmp_path / "m", "--base", llama)
    dowser_json("merge", llama_adapter, "-o", tmp_path / "n")
    assert (tmp_path / "m/model.safetensors").read_bytes() == (tmp_path / "n/model.safetensors").read_bytes()


@pytest.mark.parametrize("options", [{"num_hidden_layers": 1}, {"intermediate_size": 32}])
def test_base_of_another_shape(dowser, tmp_path, llama_adapter, options):
    models.tiny_llama(**options).save_pretrained(tmp_path / "other")
    result = dowser("merge", llama_adapter, "-o", tmp_path / "m", "--base", tmp_path / "other")
    assert result.exit_code == 1
    assert "belongs to another base model" in result.stderr
    assert not (tmp_path / "m").exists()


def test_base_with_other_weights_is_warned_about(dowser, tmp_path, llama_adapter):
    model = models.tiny_llama()
    for parameter in model.parameters():
        parameter.data.neg_()
    model.save_pretrained(tmp_path / "other")
    result = dowser("merge", llama_adapter, "-o", tmp_path / "m", "--base", tmp_path / "other")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: this adapter was trained on other base weights")
    assert ".py" not in result.stderr


def test_full_folder_is_replaced_only_by_force(dowser, dowser_json, tmp_path, llama_adapter):
    output = tmp_path / "m"
    dowser_json("merge", llama_adapter, "-o", output)
    (output / "old").write_text("")
    result = dowser("merge", llama_adapter, "-o", output)
    assert result.exit_code == 1 and "--force" in result.stderr
    assert (output / "old").exists()
    dowser_json("merge", llama_adapter, "-o", output, "--force")
    assert not (output / "old").exists() and (output / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_empty_folder_needs_no_force(dowser_json, tmp_path, llama_adapter):
    (tmp_path / "m").mkdir()
    dowser_json("merge", llama_adapter, "-o", tmp_path / "m")


def test_force_never_deletes_what_is_not_a_model(dowser, tmp_path, llama_adapter):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = dowser("merge", llama_adapter, "-o", tmp_path, "--force")
    assert result.exit_code == 1 and "no model that --force could replace" in result.stderr
    (tmp_path / "file").write_text("")
    result = dowser("merge", llama_adapter, "-o", tmp_path / "file", "--force")
    assert result.exit_code == 1 and "is a file" in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_force_never_replaces_the_base_or_the_adapter(dowser, llama, llama_adapter):
    for folder in (llama, llama.parent, llama_adapter):
        result = dowser("merge", llama_adapter, "-o", folder, "--force")
        assert result.exit_code == 1 and "would replace what is read" in result.stderr
    assert (llama / "model.safetensors").exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_the_old_folder(dowser, dowser_json, tmp_path, llama_adapter, monkeypatch, error):
    output = tmp_path / "m"
    dowser_json("merge", llama_adapter, "-o", output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise error

    monkeypatch.setattr(merge_module, "_check_saved", fail)
    result = dowser("merge", llama_adapter, "-o", output, "--force", "--dtype", "float32")
    assert result.exit_code == (1 if isinstance(error, OSError) else 130)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_damaged_result_is_noticed(dowser, tmp_path, llama_adapter, monkeypatch):
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def save_half(self: PreTrainedModel, folder: Path, **options: object) -> None:
        save(self, folder, **options)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_half)
    result = dowser("merge", llama_adapter, "-o", tmp_path / "m")
    assert result.exit_code == 1 and "truncated or corrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_shard_of_the_index_is_checked(tmp_path, llama):
    model = load_model(Source(str(llama)))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(merge_module._check_saved(tmp_path)) > 1
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="incomplete"):
        merge_module._check_saved(tmp_path)


def test_values_that_are_not_numbers_are_refused(dowser, tmp_path, llama, llama_adapter):
    from safetensors.torch import load_file, save_file

    adapter = Path(shutil.copytree(llama_adapter, tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(value for key, value in tensors.items() if key.endswith(".dowser_values"))[0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    result = dowser("merge", adapter, "-o", tmp_path / "m")
    assert result.exit_code == 1 and "NaNs detected" in result.stderr
    assert not (tmp_path / "m").exists()


def test_model_with_its_own_code_takes_the_code_along(dowser, tmp_path, llama):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    (base / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((base / "config.json").read_text())
    own = config | {"auto_map": auto_map, "model_type": "own", "architectures": ["OwnModel"]}
    (base / "config.json").write_text(json.dumps(own))
    model = load_model(Source(str(base), trust_remote_code=True))
    adapter = trained_adapter(base, tmp_path / "adapter", model)
    result = dowser("merge", adapter, "-o", tmp_path / "m")
    assert result.exit_code == 1 and "trust_remote_code" in result.stderr
    result = dowser("merge", adapter, "-o", tmp_path / "m", "--trust-remote-code")
    assert result.exit_code == 0, result.output
    shutil.rmtree(base)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter))
    assert torch.equal(_answer(merged, _inputs("llama")), _answer(adapted, _inputs("llama")))


class TestFourBit:
    """An adapter trained on a base that was quantised while loading."""

    @pytest.fixture
    def adapter(self, tmp_path, llama) -> Path:
        pytest.importorskip("bitsandbytes")
        quantised = load_model(Source(str(llama)), load_in_4bit=True)
        return trained_adapter(llama, tmp_path / "adapter", quantised)

    def test_goes_into_the_unquantised_base(self, dowser, tmp_path, llama, adapter):
        result = dowser("merge", adapter, "-o", tmp_path / "m")
        assert result.exit_code == 0 and "trained on a quantised base" in result.stderr
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter))
        assert not hasattr(merged.config, "quantization_config")
        assert torch.equal(_answer(merged, _inputs("llama")), _answer(adapted, _inputs("llama")))

    def test_or_into_what_it_was_trained_on(self, dowser, tmp_path, llama, adapter):
        result = dowser("merge", adapter, "-o", tmp_path / "m", "--load-in-4bit")
        assert result.exit_code == 0 and "trained on a quantised base" not in result.stderr
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
        adapted = PeftModel.from_pretrained(load_model(Source(str(llama)), load_in_4bit=True), str(adapter))
        torch.testing.assert_close(_answer(merged, _inputs("llama")), _answer(adapted, _inputs("llama")))

    def test_quantised_checkpoint_becomes_an_ordinary_one(self, dowser_json, tmp_path, llama, adapter):
        load_model(Source(str(llama)), load_in_4bit=True).save_pretrained(tmp_path / "base")
        result = dowser_json("merge", adapter, "-o", tmp_path / "m", "--base", tmp_path / "base")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert result["dtype"] == "bfloat16" and not hasattr(merged.config, "quantization_config")
        dowser_json("merge", adapter, "-o", tmp_path / "n", "--load-in-4bit")
        same = AutoModelForCausalLM.from_pretrained(tmp_path / "n")
        assert torch.equal(_answer(merged, _inputs("llama")), _answer(same, _inputs("llama")))


def test_adapter_of_columns(dowser_json, llama, tmp_path):
    folder = trained_adapter(llama, tmp_path / "adapter", granularity="column", rho=0.2)
    report = dowser_json("merge", folder, "-o", tmp_path / "merged", "--dtype", "float32")
    adapted = PeftModel.from_pretrained(load_model(Source(str(llama)), "float32"), str(folder)).get_base_model()
    merged = load_model(Source(str(tmp_path / "merged")), "float32")
    layers = {name: module for name, module in adapted.named_modules() if hasattr(module, "dowser_columns")}
    assert len(layers) == 14 and report["trained"] == sum(
        layer.dowser_values["default"].numel() for layer in layers.values()
    )
    for name, layer in layers.items():
        expected = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert torch.equal(merged.get_submodule(name).weight, expected)
