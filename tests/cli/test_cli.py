"""The command as a whole: help, version, errors and exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dowser_peft.cli import common, models
from dowser_peft.cli.naming import in_model_order, places

COMMANDS = ("probe", "train", "inspect", "merge", "export", "import", "demo")


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def test_module_runs_as_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "dowser_peft", "--version"], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"dowser-peft \d+\.\d+\S*\n", result.stdout)


def test_help_lists_the_commands(dowser):
    result = dowser("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_two_examples(dowser, command):
    result = dowser(command, "--help")
    assert result.exit_code == 0
    assert _plain(result.stdout).count(f"dowser-peft {command} ") >= 3  # usage and two examples


@pytest.mark.parametrize("arguments", [("unknown",), ("probe",), ("probe", "m", "-o", "s", "--num-prompts", "0")])
def test_wrong_usage_exits_with_2(dowser, arguments):
    result = dowser(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_an_error_is_one_line_on_stderr(dowser, tmp_path):
    result = dowser("inspect", tmp_path / "nothing.safetensors", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "nothing.safetensors" in result.stderr


def test_what_libraries_print_is_no_result(dowser, dowser_json, llama, tmp_path, monkeypatch):
    """DeepSpeed, for one, writes a warning to stdout when it is imported."""
    original = models.load_model

    def talkative(*arguments, **options):
        print("[WARNING] no accelerator")
        return original(*arguments, **options)

    monkeypatch.setattr(models, "load_model", talkative)
    options = ["--num-prompts", "2", "--num-probes", "1", "--prompt-length", "4"]
    assert dowser_json("probe", llama, "-o", tmp_path / "a.safetensors", *options)["num_prompts"] == 2
    shown = dowser("probe", llama, "-o", tmp_path / "b.safetensors", *options)
    assert "Probed" in shown.stdout and "no accelerator" not in shown.stdout
    assert "no accelerator" in shown.stderr and "Probed" not in shown.stderr


def test_debug_shows_the_traceback(dowser, tmp_path, monkeypatch):
    assert isinstance(dowser("inspect", tmp_path / "x", "--debug").exception, FileNotFoundError)
    monkeypatch.setenv("DOWSER_DEBUG", "1")
    assert isinstance(dowser("inspect", tmp_path / "x").exception, FileNotFoundError)


def test_a_bug_is_not_disguised_as_a_user_error(dowser, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "adapter_folder", lambda name: {}[name])
    assert isinstance(dowser("inspect", tmp_path).exception, KeyError)


def test_control_c_exits_with_130(dowser, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupt)
    result = dowser("probe", tmp_path, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "no model folder"),
        ("./nothing", "no model folder"),
        ("some/model/with/parts", "no model folder"),
    ],
)
def test_missing_model(dowser, tmp_path, name, message):
    result = dowser("probe", name, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 1
    assert message in result.stderr and name in result.stderr


def test_model_that_is_not_on_this_machine_nor_on_the_hub(dowser, tmp_path):
    result = dowser("probe", "nobody/nothing", "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 1
    assert "nobody/nothing" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_adapter_that_is_not_on_this_machine_nor_on_the_hub(dowser, tmp_path, command):
    output = ("-o", tmp_path / "m") if command == "merge" else ()
    for name, message in (("nobody/nothing", "nobody/nothing"), ("./nothing", "no adapter folder at './nothing'")):
        result = dowser(command, name, *output)
        assert result.exit_code == 1
        assert message in result.stderr and result.stderr.count("\n") == 1


def test_adapter_from_the_hub(dowser_json, tmp_path, llama_adapter, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name: str, **_: object) -> str:
        asked.append(name)
        return str(llama_adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert dowser_json("inspect", "somebody/adapter")["modules"] == dowser_json("inspect", llama_adapter)["modules"]
    assert asked == ["somebody/adapter"]


def test_adapter_or_empty_folder_where_a_model_belongs(dowser, tmp_path, llama_adapter):
    result = dowser("probe", llama_adapter, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 1 and "is an adapter, not a model" in result.stderr
    result = dowser("probe", tmp_path, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 1 and "no config.json" in result.stderr


def test_code_of_a_model_runs_only_with_permission(dowser, tmp_path, llama):
    marker = tmp_path / "it-ran"
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}'
    )
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('')\n"
        "from transformers import PretrainedConfig\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    result = dowser("probe", folder, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 1 and "trust_remote_code" in result.stderr
    assert not marker.exists()
    assert (
        dowser("probe", folder, "-o", tmp_path / "s.safetensors", "--trust-remote-code").exit_code == 1
    )  # no OwnModel
    assert marker.exists()


def test_the_class_is_the_one_the_configuration_names(llama, llava):
    from transformers import BertConfig, LlamaConfig, T5Config

    assert models.model_class(models.load_config(models.Source(str(llama)))).__name__ == "LlamaForCausalLM"
    assert (
        models.model_class(models.load_config(models.Source(str(llava)))).__name__ == "LlavaForConditionalGeneration"
    )
    assert models.model_class(LlamaConfig(architectures=["NotInTransformers"])).__name__ == "AutoModelForCausalLM"
    assert models.model_class(LlamaConfig(architectures=["pipeline"])).__name__ == "AutoModelForCausalLM"
    assert models.model_class(T5Config()).__name__ == "AutoModelForSeq2SeqLM"
    assert models.model_class(BertConfig(architectures=["BertModel"])).__name__ == "BertModel"


def test_checkpoint_without_some_weights_is_refused(dowser, tmp_path, llama):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    result = dowser("probe", folder, "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 1
    assert "lack 1 weights" in result.stderr and "model.layers.1.mlp.up_proj.weight" in result.stderr


def test_names_are_split_into_layer_and_module():
    found = places(["model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj", "score"])
    assert [(p.layer, p.module) for p in found.values()] == [("0", "up_proj"), ("10", "up_proj"), ("-", "score")]
    found = places(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc"])
    assert [p.module for p in found.values()] == ["attn.c_proj", "mlp.c_proj", "c_fc"]
    found = places(["encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q", "decoder.block.0.layer.1.q"])
    assert [p.layer for p in found.values()] == ["encoder.0", "decoder.0", "decoder.0"]
    assert [p.module for p in found.values()] == ["0.q", "0.q", "1.q"]
    assert places(["0.up"])["0.up"].layer == "0"


def test_order_is_the_models_not_the_alphabets():
    names = ["l.10.q_proj", "l.2.down_proj", "l.2.v_proj", "l.2.q_proj"]
    assert in_model_order(names) == ["l.2.q_proj", "l.2.v_proj", "l.2.down_proj", "l.10.q_proj"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (92848, "92.8 kB"), (13_500_000_000, "13.5 GB"), (10**15, "1e+03 TB")],
)
def test_sizes_are_readable(size, text):
    assert common.human_bytes(size) == text


def test_json_has_no_nan(capsys):
    common.print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (2, None)}})
    import json

    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [2, None]}}
