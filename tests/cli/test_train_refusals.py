"""``dowser-peft train`` on wrong input: one clear error before anything is trained, and nothing lost."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from dowser_peft import DowserConfig
from dowser_peft.cli import train
from dowser_peft.cli.models import Source, load_model
from dowser_peft.cli.training.checkpoints import check_same_targets, find_checkpoint
from dowser_peft.cli.training.data import load_data
from dowser_peft.cli.training.trainer import settle_unused_parameters, warn_about_compute_dtype
from tests import models
from tests.cli.train_helpers import (
    FLAGS,
    PROMPTS,
    adapter_tensors,
    as_flags,
    conversations,
    run_in_process,
    write_images,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def refused(dowser: Callable[..., Any], llama_text: Path, text_file: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a training that must fail without leaving a file; returns stderr."""

    def run(*arguments: Any, exit_code: int = 1, **settings: Any) -> str:
        output = settings.pop("output_dir", tmp_path / "out")
        before = list(output.rglob("*"))
        given = {"model_name_or_path": llama_text, "dataset_name": text_file, "output_dir": output} | settings
        result = dowser("train", *as_flags(FLAGS, **given), *arguments)
        assert result.exit_code == exit_code and isinstance(result.exception, SystemExit), result.exception
        assert result.stdout == "" and list(output.rglob("*")) == before
        return " ".join(result.stderr.replace("│", " ").split())

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rat", "1e-3"], "No such option: --learning_rat; did you mean --learning_rate"),
        (["--num-prompt=3"], "No such option: --num-prompt; did you mean --num_prompts"),
        (["--qqq"], "No such option: --qqq; `dowser-peft train --help-all` lists all"),
        (["stray"], "Unexpected argument 'stray'"),
        (["--use_peft"], "--use_peft is for LoRA"),
        (["--lora_r", "8"], "--lora_r is for LoRA"),
        (["--rho", "much"], "--rho: invalid float value: 'much'"),
        (["--granularity", "row"], "--granularity: invalid choice: 'row'"),
        (["--retention_examples", "0"], "--retention_examples must be positive"),
        (["--config"], "--config needs the path"),
    ],
)
def test_wrong_usage(refused, arguments, message):
    assert message in refused(*arguments, exit_code=2)


def test_help_tells_every_field_once(dowser):
    """DowserConfig's own words, TRL's usual flags, and where the others are."""
    text = " ".join(dowser("train", "--help").stdout.partition("─ Model ")[2].replace("│", " ").split())
    for each in dataclasses.fields(DowserConfig):
        flag = {"seed": "probe_seed"}.get(each.name, each.name)
        is_flag = each.name not in {
            "init_weights",
            "base_fingerprint",
            *(f.name for f in dataclasses.fields(PeftConfig)),
        }
        assert text.count(f" --{flag} ") == is_flag, flag
        assert not is_flag or f"--{flag} {each.metadata['help'][:30]}" in text
    assert "--learning_rate The initial learning rate for AdamW. [default: 0.001]" in text
    assert "--gradient_checkpointing" in text and "--help-all" in text and "--lora_r" not in text
    everything = " ".join(dowser("train", "--help-all").stdout.replace("│", " ").split())
    assert "--neftune_noise_alpha" in everything and "--neftune_noise_alpha" not in text
    assert "--lora_r" not in everything and everything.count(" --rho ") == 1


def test_without_trl(dowser, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(train, "find_spec", lambda name: None if name == "trl" else found(name))
    result = dowser("train", "--rho", "0.1")
    assert result.exit_code == 1
    assert result.stderr == 'error: dowser-peft train needs trl: pip install "dowser-peft[train]"\n'


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "output_dir"])
def test_what_must_be_given(dowser, name, tmp_path):
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": tmp_path / "o"}
    del given[name]
    result = dowser("train", *as_flags(given))
    assert result.exit_code == 2 and f"Missing option --{name}" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3", "no such argument 'learning_rat'; did you mean 'learning_rate'"),
        ("rho: 10", "rho must be in (0, 1], got 10.0; rho is a fraction: for 10 % write 0.1"),
        ("granularity: row", "granularity must be one of ('element', 'column'), got 'row'"),
        ("- rho", "must hold 'name: value' lines"),
        ("rho: [", "is not YAML"),
    ],
)
def test_wrong_yaml(refused, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in refused("--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"report_to": "wandb"}, "--report_to wandb needs the package of that tracker"),
        ({"report_to": "wandbb"}, "wandbb is not supported"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be positive, got 0"),
        ({"learning_rate": "nan"}, "--learning_rate must be a number of at least 0, got nan"),
        ({"weight_decay": -1}, "--weight_decay must be a number of at least 0, got -1"),
        ({"use_liger_kernel": True}, "pip install liger-kernel"),
        ({"push_to_hub": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_settings_are_tried_before_anything_is_loaded(refused, monkeypatch, settings, message):
    monkeypatch.setattr("dowser_peft.cli.training.settings.get_available_reporting_integrations", list)
    monkeypatch.setattr("dowser_peft.cli.training.settings.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("dowser_peft.cli.training.settings.is_offline_mode", lambda: True)
    assert message in refused(**settings, model_name_or_path="/nowhere")


def test_assistants_that_cannot_be_told(refused, llama_text, tmp_path):
    """Before the model is loaded, which the folder lacks."""
    folder = Path(shutil.copytree(llama_text, tmp_path / "chat", ignore=shutil.ignore_patterns("*.safetensors")))
    message = refused(assistant_only_loss=True, model_name_or_path=folder)
    assert "--assistant_only_loss needs conversations ('messages'), and the data have 'text'" in message
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    messages = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": messages}])
    message = refused(assistant_only_loss=True, model_name_or_path=folder, dataset_name=data)
    assert "in chat_template.jinja" in message and "'prompt' and 'completion'" in message


def test_no_yaml(refused):
    assert "no file 'nowhere.yaml'" in refused("--config", "nowhere.yaml")


def test_values_are_checked_before_anything_is_loaded(refused):
    assert "rho must be in (0, 1]" in refused(rho=10, model_name_or_path="/nowhere")
    assert "takes a JSON object such as" in refused(rho_pattern="down_proj=0.1", model_name_or_path="/nowhere")
    assert "nor a file of probe statistics" in refused(importance="gone.safetensors", model_name_or_path="/nowhere")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "w1", "answer": "w2"}], "no column to train on: that would be 'text' (named by"),
        ([{"question": "w1", "answer": "w2"}], "It has 'question', 'answer'"),
        ([{"prompt": "w1", "answer": "w2"}], "It has 'prompt', 'answer'"),
        ([{"text": "w1"}, {"text": None}], "has 1 empty cells in its column 'text'"),
        ([{"text": "w1", "image": "none.png"}], "none.png', which does not exist: see --image_folder"),
    ],
)
def test_data_that_cannot_be_trained_on(refused, tmp_path, rows, message):
    assert message in refused(dataset_name=write_rows(tmp_path / "data.jsonl", rows))


def test_data_that_cannot_be_read(refused, tmp_path, text_file):
    assert "no data file '/gone.jsonl'" in refused(dataset_name="/gone.jsonl")
    (tmp_path / "data.txt").write_text("words")
    assert "it is no .json, .jsonl, .csv, .tsv, .parquet file" in refused(dataset_name=tmp_path / "data.txt")
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": ')
    assert "cannot read the dataset" in refused(dataset_name=tmp_path / "broken.jsonl")
    assert 'Unknown split "test"' in refused(dataset_name=text_file, dataset_train_split="test")
    assert "nobody/nothing" in refused(dataset_name="nobody/nothing")
    splits = DatasetDict({name: Dataset.from_dict({"text": ["w1"]}) for name in ("a", "b")})
    splits.save_to_disk(tmp_path / "saved")
    assert "it has no split 'train', but a, b" in refused(dataset_name=tmp_path / "saved")
    message = refused(dataset_name=text_file, retention_dataset=tmp_path / "saved")
    assert "Pass --retention_split, one of a, b" in message
    (tmp_path / "header.csv").write_text("text\n")
    assert 'header.csv\': Instruction "train" corresponds to no data' in refused(dataset_name=tmp_path / "header.csv")
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl' has no examples in its split 'train'" in refused(dataset_name=tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="has no examples"):
        load_data(str(tmp_path / "empty.jsonl"), None, "train", "text", streaming=True)


def test_retention_needs_other_data_and_a_base(refused, text_file):
    assert "the retention data are the training data" in refused(retention_dataset=text_file)
    assert "--retention_dataset needs --bias none" in refused(retention_dataset=text_file, bias="all")


def test_answers_that_are_all_cut_off(refused, dowser, prompts_file, llama_text, tmp_path):
    """Prompts have one to four words. What is left out in part is only warned about."""
    message = refused(dataset_name=prompts_file, max_length=1)
    assert "--max_length 1 cuts off the answer of every example" in message
    message = refused(dataset_name=prompts_file, retention_dataset=_long(tmp_path), max_length=5)
    assert "cuts off the answer of every example of the retention data" in message
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=prompts_file, output_dir=tmp_path / "o")
    result = dowser("train", *flags, "--max_length", 3, "--max_steps", 1)
    assert result.exit_code == 0, result.output
    assert "--max_length 3 cuts off the answer of 2 of 4 examples: these are left out" in result.stderr


def _long(folder: Path) -> Path:
    return write_rows(folder / "long.jsonl", [{"prompt": "w10 " * 20, "completion": " w11"}])


def test_no_epochs(refused):
    assert "--num_train_epochs 0.0 leaves nothing to train" in refused(max_steps=-1, num_train_epochs=0)


def test_tokenizer_without_an_image_processor(refused, llava, tmp_path):
    folder = Path(shutil.copytree(llava, tmp_path / "merged"))
    (folder / "preprocessor_config.json").unlink()
    message = refused(model_name_or_path=folder)
    assert "comes with a tokenizer, but no processor that could be loaded" in message


class TestImages:
    @pytest.fixture
    def rows(self, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
        write_images(tmp_path / "pictures")
        return lambda rows: write_rows(tmp_path / "pictures" / "data.jsonl", rows)

    def test_model_without_a_processor(self, refused, rows):
        message = refused(dataset_name=rows(conversations()))
        assert "(column 'images')" in message and "comes with no processor for them, only with a" in message

    def test_processor_without_an_image_token(self, refused, rows, llava_processor, tmp_path):
        folder = Path(shutil.copytree(llava_processor, tmp_path / "llava"))
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
            text = (folder / name).read_text()
            (folder / name).write_text(
                text.replace("<image>", "<picture>" if name != "processor_config.json" else "<i>")
            )
        message = refused(dataset_name=rows(conversations()), model_name_or_path=folder)
        assert "has no image token: " in message and "is not in its vocabulary" in message

    def test_text_without_a_place_for_the_image(self, refused, rows, llava_processor):
        data = rows([{"image": "0.png", "prompt": PROMPTS[0], "completion": " w13"}])
        message = refused(dataset_name=data, model_name_or_path=llava_processor)
        assert "its text has no '<image>' where the image goes" in message

    def test_conversation_without_a_place_for_the_image(self, refused, rows, llava_processor):
        first, second = conversations()[:2]
        second["conversations"][0]["value"] = "w20"
        message = refused(dataset_name=rows([first, second]), model_name_or_path=llava_processor)
        assert "a conversation has 0 '<image>' for 1 images: 'w20'" in message

    def test_answers_that_are_all_cut_off(self, refused, rows, llava_processor):
        """Each prompt has four tokens of its image."""
        data = rows([{"image": "0.png", "prompt": "<image> w10", "completion": " w13"}])
        message = refused(dataset_name=data, model_name_or_path=llava_processor, max_length=5)
        assert "--max_length 5 cuts off the answer of each of the first 1 examples" in message


@pytest.fixture(scope="module")
def finished(llama_text: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    flags = as_flags(FLAGS, model_name_or_path=llama_text, dataset_name=text_file, output_dir=output)
    run_in_process("train", *flags, "--max_steps", 1, "--save_steps", 1, "--json")
    return output


class TestResuming:
    @pytest.fixture
    def unchanged(self, finished: Path) -> Any:
        """The run, every file of which is the same after the test."""
        before = _contents(finished)
        yield finished
        assert _contents(finished) == before

    def test_full_folder(self, refused, unchanged):
        message = refused(output_dir=unchanged)
        assert "is not empty: pass --resume_from_checkpoint true to go on from checkpoint-1, or choose" in message

    def test_file_or_foreign_folder(self, refused, tmp_path, unchanged):
        (tmp_path / "thesis.tex").write_text("years of work")
        message = refused(output_dir=tmp_path)
        assert "is not empty: choose another folder" in message and "--resume" not in message
        assert "is a file" in refused(output_dir=tmp_path / "thesis.tex")
        message = refused(output_dir=tmp_path, resume_from_checkpoint=unchanged / "checkpoint-1")
        assert "is of another run" in message
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_nothing_to_go_on_from(self, refused, tmp_path, unchanged):
        assert "has no complete checkpoint" in refused(resume_from_checkpoint="true")
        message = refused(output_dir=unchanged, resume_from_checkpoint=unchanged / "checkpoint-2")
        assert "is no complete checkpoint of a Dowser adapter" in message and "has checkpoint-1" in message

    @pytest.mark.parametrize(
        ("setting", "value", "message"),
        [
            ("rho", 0.2, "was trained with rho = 0.1, and this run asks for 0.2: pass --rho as in that run"),
            ("granularity", "column", "granularity = 'element', and this run asks for 'column'"),
            ("num_last_layers", 1, "num_last_layers = None, and this run asks for 1"),
            ("target_modules", "q_proj", "and this run asks for ['q_proj']"),
        ],
    )
    def test_checkpoint_of_another_adapter(self, refused, unchanged, setting, value, message):
        found = refused(output_dir=unchanged, resume_from_checkpoint="true", **{setting: value})
        assert message in found

    @pytest.mark.parametrize(
        "targets",
        [
            ["--target_modules", "all-linear"],
            ["--target_modules", "q_proj", "v_proj", "--num_last_layers", "1"],
            ["--target_modules", ".*layers.0.*(q|down)_proj"],
        ],
    )
    def test_the_same_command_goes_on(self, dowser, llama_text, text_file, tmp_path, targets):
        """A checkpoint names its modules in another way than the command. Its file is written as asked now."""
        given = {"model_name_or_path": llama_text, "dataset_name": text_file, "output_dir": tmp_path / "run"}
        flags = [*as_flags(FLAGS, **given, importance="random", save_steps=1, max_steps=1), *targets]
        assert dowser("train", *flags).exit_code == 0
        flags = [*flags, "--max_steps", 2, "--save_dtype", "bfloat16", "--resume_from_checkpoint", "true"]
        result = dowser("train", *flags)
        assert result.exit_code == 0, result.output
        tensors = adapter_tensors(tmp_path / "run")
        assert {t.dtype for name, t in tensors.items() if name.endswith("dowser_values")} == {torch.bfloat16}

    def test_targets_are_compared_on_the_model(self, finished):
        """Of a mixture, whose checkpoint has both modules and fused parameters."""
        from peft import get_peft_model

        config = DowserConfig(importance="random", target_modules=["q_proj"], target_parameters=["down_proj"])
        get_peft_model(models.tiny_mixtral(), config).save_pretrained(str(finished.parent / "mixture"))
        folder, model = finished.parent / "mixture", models.tiny_mixtral()
        check_same_targets(folder, dataclasses.replace(config), model)
        other = DowserConfig(importance="random", target_modules=["q_proj"], target_parameters=["gate_up_proj"])
        with pytest.raises(ValueError, match=r"target_parameters = .*asks for \['gate_up_proj'\].*pass --target_para"):
            check_same_targets(folder, other, model)
        with pytest.raises(ValueError, match="asks for the default ones"):
            check_same_targets(folder, DowserConfig(), model)

    def test_checkpoint_of_another_optimizer(self, refused, unchanged):
        message = refused(output_dir=unchanged, resume_from_checkpoint="true", optim="sgd", max_steps=2)
        assert "holds the state of another optimizer than --optim sgd" in message and "betas" in message

    def test_optimizer_state_of_other_shapes(self, refused, finished, tmp_path):
        """As if an adapter with another rho had been copied into the folder."""
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        state = torch.load(run / "checkpoint-1" / "optimizer.pt", weights_only=True)
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-1].clone()
        torch.save(state, run / "checkpoint-1" / "optimizer.pt")
        before = _contents(run)
        message = refused(output_dir=run, resume_from_checkpoint="true", max_steps=2)
        assert "holds 'exp_avg' of shape (" in message and "another rho or another model" in message
        assert _contents(run) == before

    def test_damaged_files(self, refused, finished, tmp_path):
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        for name, message in (
            ("optimizer.pt", "optimizer.pt' is damaged"),
            ("adapter_model.safetensors", "truncated or corrupted"),
        ):
            file = run / "checkpoint-1" / name
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            assert message in refused(output_dir=run, resume_from_checkpoint="true", max_steps=2)
            file.write_bytes(whole)

    @pytest.mark.parametrize("name", ["scheduler.pt", "rng_state.pth", "optimizer.pt"])
    def test_states_that_are_no_states(self, refused, finished, tmp_path, name):
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        (run / "checkpoint-1" / name).write_bytes(b"xx")
        message = refused(output_dir=run, resume_from_checkpoint="true", max_steps=2)
        assert f"checkpoint-1/{name}' is damaged" in message and "from an older checkpoint" in message

    def test_torn_state_of_the_trainer(self, finished, tmp_path):
        """As after a crash: the checkpoint before it is gone on from."""
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        torn = Path(shutil.copytree(run / "checkpoint-1", run / "checkpoint-2"))
        (torn / "trainer_state.json").write_text('{"global_step": 2, "log')
        with pytest.warns(UserWarning, match=r"\(its trainer_state.json is damaged\): going on from checkpoint-1"):
            assert find_checkpoint(run, "true") == run / "checkpoint-1"
        with pytest.raises(ValueError, match="its trainer_state.json is damaged"):
            find_checkpoint(run, str(torn))

    def test_adapter_without_a_module_or_without_numbers(self, refused, finished, tmp_path):
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        file = run / "checkpoint-1" / "adapter_model.safetensors"
        tensors = load_file(file)
        first = next(name for name in tensors if name.endswith("dowser_values")).removesuffix(".dowser_values")
        save_file({name: t for name, t in tensors.items() if not name.startswith(first)}, file, {"format": "pt"})
        message = refused(output_dir=run, resume_from_checkpoint="true", max_steps=2)
        assert f"{file}' is damaged: it has no values for '{first.removeprefix('base_model.model.')}'" in message
        tensors[f"{first}.dowser_values"].fill_(torch.nan)
        save_file(tensors, file, {"format": "pt"})
        message = refused(output_dir=run, resume_from_checkpoint="true", max_steps=2)
        assert f"{file}' holds NaN or infinity in '{first}.dowser_values'" in message

    def test_finished_run(self, dowser_json, dowser, llama_text, text_file, finished, tmp_path):
        """Its loss is not known, and not zero."""
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        given = {"model_name_or_path": llama_text, "dataset_name": text_file, "output_dir": run, "max_steps": 1}
        flags = as_flags(FLAGS, **given, resume_from_checkpoint="true")
        result = dowser("train", *flags)
        assert result.exit_code == 0 and "note: nothing left to train: the run has its 1 steps" in result.stderr
        assert "none: nothing was left to train" in result.stdout and "import dowser_peft; PeftModel" in result.stdout
        assert dowser_json("train", *flags)["loss"] is None

    def test_base_with_other_weights_is_warned_about(self, dowser, llama_text, text_file, finished, tmp_path):
        """The checkpoint is trained on, as PEFT would, but both fingerprints are told."""
        run = Path(shutil.copytree(finished, tmp_path / "run"))
        other = Path(shutil.copytree(llama_text, tmp_path / "other"))
        model = models.tiny_llama().bfloat16()
        for parameter in model.parameters():
            parameter.data.neg_()
        model.save_pretrained(other)
        flags = as_flags(FLAGS, model_name_or_path=other, dataset_name=text_file, output_dir=run, max_steps=2)
        result = dowser("train", *flags, "--resume_from_checkpoint", "true")
        assert result.exit_code == 0, result.output
        fingerprint = DowserConfig.from_pretrained(run / "checkpoint-1").base_fingerprint
        assert "warning: this adapter was trained on other base weights" in result.stderr
        assert f"(fingerprint {fingerprint}; this model has " in result.stderr


def _contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("compute", "training", "warned"),
    [
        (torch.float32, {"bf16": True}, "computes in float32 (bnb_4bit_compute_dtype), the training in bfloat16"),
        (torch.float16, {"bf16": True}, "rounded or overflow differently. Pass --dtype bfloat16"),
        (torch.bfloat16, {"bf16": True}, None),
        (torch.float32, {"bf16": False}, None),
    ],
)
def test_compute_dtype_of_a_4bit_base(llama_text, tmp_path, recwarn, compute, training, warned):
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
    model = load_model(Source(str(llama_text)), quantization_config=settings)
    recwarn.clear()
    warn_about_compute_dtype(model, SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], **training))
    messages = [str(entry.message) for entry in recwarn if "4-bit" in str(entry.message)]
    assert (warned in messages[0]) if warned else not messages


def test_a_base_of_full_precision_is_not_warned_about(llama_text, tmp_path, recwarn):
    from trl import SFTConfig

    warn_about_compute_dtype(load_model(Source(str(llama_text))), SFTConfig(output_dir=str(tmp_path), use_cpu=True))
    assert not [entry for entry in recwarn if "4-bit" in str(entry.message)]


@pytest.mark.parametrize(
    ("build", "options", "asked", "expected"),
    [
        (models.tiny_llama, {}, None, False),
        (models.tiny_llama, {}, True, True),
        (models.tiny_mixtral, {}, None, None),
        (models.tiny_llama, {"modules_to_save": ["lm_head"]}, None, None),
    ],
)
def test_unused_parameters_are_looked_for_where_there_can_be_any(tmp_path, build, options, asked, expected):
    from trl import SFTConfig

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, ddp_find_unused_parameters=asked)
    settle_unused_parameters(args, build(), None, DowserConfig(**options))
    assert args.ddp_find_unused_parameters is expected
