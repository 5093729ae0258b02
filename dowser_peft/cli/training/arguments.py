"""Flags and YAML keys of ``dowser-peft train``: those of TRL's script, of DowserConfig and a few for the data.

Everything is parsed by TRL's parser, so a flag means here what it means in TRL's own scripts. The flags of
DowserConfig are made of its fields and their help; nothing is described twice. What differs from TRL:

    learning_rate   1e-3, because only the delta trains
    dtype           bfloat16 in bf16 training (TRL: float32): the frozen base needs no more
    bf16, use_cpu   what this machine supports
    ddp_broadcast_buffers   off: the masks never change
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from peft import PeftConfig
from transformers.utils import is_torch_bf16_gpu_available
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from dowser_peft import DowserConfig
from dowser_peft.cli.common import shows_progress

LEARNING_RATE = 1e-3  # README: the best rate of the sweep

# Not flags: for tests, or written by saving. TRL has a seed of its own, which is that of the training.
_NOT_FLAGS = ("init_weights", "base_fingerprint")
_FLAG_OF = {"seed": "probe_seed"}

# What the help shows; --help-all shows the rest of TRL's flags.
_SHOWN = {
    "Model": "model_name_or_path model_revision dtype load_in_4bit load_in_8bit use_bnb_nested_quant "
    "attn_implementation trust_remote_code",
    "Data": "dataset_name dataset_config dataset_train_split dataset_test_split dataset_streaming image_folder "
    "dataset_text_field max_length packing completion_only_loss assistant_only_loss",
    "Training": "output_dir resume_from_checkpoint learning_rate lr_scheduler_type warmup_steps num_train_epochs "
    "max_steps per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing bf16 optim weight_decay "
    "max_grad_norm seed logging_steps report_to save_strategy save_steps save_total_limit eval_strategy eval_steps "
    "push_to_hub",
}
_HELP = {
    "model_name_or_path": "The base model: a local folder or a hub id.",
    "model_revision": "Its branch, tag or commit on the hub.",
    "dtype": "Of the base weights: bfloat16, float16, float32, or auto, as they are stored. Default: that of the "
    "training, bfloat16 with bf16, float16 with fp16, else float32.",
    "resume_from_checkpoint": "Go on from a checkpoint: its folder, or 'true' for the latest in output_dir.",
    "dataset_name": "The data: a hub id, a folder, or a .json, .jsonl, .csv, .tsv or .parquet file with a column "
    "'text', 'messages' or 'conversations', or the columns 'prompt' and 'completion'; images in 'image' or 'images'.",
    "dataset_train_split": "Split to train on; part of one as 'train[:90%]'.",
    "dataset_test_split": "Split to evaluate on, with eval_strategy.",
    "load_in_8bit": "Quantise the base to 8 bit on loading.",
    "load_in_4bit": "Quantise the base to 4 bit on loading.",
}
# Parsed by TRL, but without meaning here: the command has its own --debug, and always trains one Dowser adapter.
_HIDDEN = re.compile(r"debug|do_(train|eval|predict)|local_rank|ignore_bias_buffers|(use_(peft|rslora|dora)|lora_.*)$")
_FOR_LORA = re.compile(r"use_(peft|rslora|dora)|lora_.*")


@dataclass
class DataArguments:
    """What TRL's arguments do not say about the data."""

    image_folder: str | None = field(
        default=None,
        metadata={"help": "Where the image paths of the data begin. Default: the folder of the data file."},
    )
    retention_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Held-out data of abilities to keep, in any format that training takes: loss and next-token "
            "accuracy of the base and of the tuned model on it are reported in the end."
        },
    )
    retention_config: str | None = field(default=None, metadata={"help": "Configuration of the retention dataset."})
    retention_split: str | None = field(
        default=None,
        metadata={"help": "Its split. Default: 'test', else 'validation', else the only one."},
    )
    retention_examples: int = field(default=256, metadata={"help": "How many of its examples are used at most."})


def _argument_type(hint: Any) -> Any:
    """The type of a DowserConfig field as the parser knows it: one list, one string, or what it was."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is list:
            return option | None
        if typing.get_origin(option) is dict:
            return str | None  # JSON on the command line
    return str if len(options) > 1 and str in options and type(None) not in options else hint


def _dowser_fields() -> Iterator[tuple[str, str, Any]]:
    """Flag, name and field of what can be set."""
    of_peft = {each.name for each in dataclasses.fields(PeftConfig)}
    for each in dataclasses.fields(DowserConfig):
        if each.name not in of_peft and each.name not in _NOT_FLAGS:
            yield _FLAG_OF.get(each.name, each.name), each.name, each


def _dowser_arguments() -> type:
    hints = typing.get_type_hints(DowserConfig)
    fields = []
    for flag, name, each in _dowser_fields():
        default = None if each.default is dataclasses.MISSING else each.default
        metadata = {"help": each.metadata["help"].replace("%", "%%")}  # argparse formats it
        fields.append((flag, _argument_type(hints[name]), field(default=default, metadata=metadata)))
    return dataclasses.make_dataclass("DowserArguments", fields)


@dataclass
class Arguments:
    """All that a run was asked to do."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    data: DataArguments
    dowser: DowserConfig


class _Parser(TrlParser):
    """TRL's parser, which reports errors through ``fail`` instead of printing three hundred flags."""

    def __init__(self, fail: Callable[[str], NoReturn]) -> None:
        self._fail = fail
        dowser = _dowser_arguments()
        classes: list[Any] = [ScriptArguments, SFTConfig, ModelConfig, DataArguments, dowser]
        super().__init__(classes, allow_abbrev=False)
        on_cpu = not torch.accelerator.is_available()
        self.set_defaults(
            output_dir="",  # else transformers chooses a folder
            learning_rate=LEARNING_RATE,
            dtype=None,
            use_cpu=on_cpu,
            bf16=None if on_cpu or is_torch_bf16_gpu_available() else False,
            ddp_broadcast_buffers=False,
            disable_tqdm=not shows_progress(),
        )
        groups = {name: _SHOWN[name].split() for name in _SHOWN}
        groups["Dowser"] = [each.name for each in dataclasses.fields(dowser)]
        groups["Retention"] = [f.name for f in dataclasses.fields(DataArguments) if f.name.startswith("retention")]
        self.groups = {name: groups[name] for name in ("Model", "Data", "Dowser", "Training", "Retention")}

    def error(self, message: str) -> NoReturn:
        self._fail(message[:1].upper() + message[1:])

    @property
    def flags(self) -> dict[str, Any]:
        """name -> argparse's action."""
        first: dict[str, Any] = {}  # a flag that is on by default has a second action, --no_...
        for action in self._actions:
            first.setdefault(action.dest, action)
        del first["help"]
        return first

    def nearest(self, name: str) -> str:
        """What the user may have meant, as the end of a sentence."""
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), self.flags, n=2, cutoff=0.7)
        if not near:
            return "; `dowser-peft train --help-all` lists all"
        return f"; did you mean {' or '.join('--' + flag if name.startswith('-') else repr(flag) for flag in near)}?"


def parse(arguments: list[str], fail: Callable[[str], NoReturn]) -> Arguments:
    """Parse the command line, and the YAML file that it names.

    Args:
        arguments: what follows ``dowser-peft train``.
        fail: called with a message about wrong usage; does not return.

    Raises:
        ValueError: if values are out of range or contradict each other.
        OSError: if there is no such YAML file.
    """
    parser = _Parser(fail)
    arguments, config = _take_config(arguments, fail)
    if config is not None:
        _check_yaml(config, parser)
        arguments = ["--config", str(Path(config).expanduser()), *arguments]
    script, training, model, data, dowser, unknown = parser.parse_args_and_config(
        arguments, return_remaining_strings=True
    )
    for name in unknown:
        if name.startswith("-"):
            fail(f"No such option: {name.partition('=')[0]}{parser.nearest(name.partition('=')[0])}")
    if unknown:
        fail(f"Unexpected argument {unknown[0]!r}: values follow a flag, as in --model_name_or_path MODEL")
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if not getattr(model if name == "model_name_or_path" else training if name == "output_dir" else script, name):
            fail(f"Missing option --{name}")
    for each in dataclasses.fields(ModelConfig):
        if _FOR_LORA.fullmatch(each.name) and getattr(model, each.name) != each.default:
            fail(f"--{each.name} is for LoRA, and this command trains a Dowser adapter: leave it out")
    if data.retention_examples < 1:
        fail(f"--retention_examples must be positive, got {data.retention_examples}")
    model.dtype = model.dtype or dtype_of(training)
    return Arguments(script, training, model, data, _dowser_config(dowser))


def dtype_of(training: SFTConfig) -> str:
    """The dtype that a training computes in."""
    return "bfloat16" if training.bf16 else "float16" if training.fp16 else "float32"


def _take_config(arguments: list[str], fail: Callable[[str], NoReturn]) -> tuple[list[str], str | None]:
    """The other arguments, and the value of --config."""
    rest: list[str] = []
    config = None
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        if config is not None:
            fail("--config may be given only once")
        config = value if equals else next(waiting, "")
        if not config:
            fail("--config needs the path of a YAML file")
    return rest, config


def _check_yaml(config: str, parser: _Parser) -> None:
    """Refuse a file that is no YAML mapping, or has unknown keys.

    Raises:
        ValueError: naming the file, and the line or the key.
        OSError: if it cannot be read.
    """
    path = Path(config).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {config!r}: --config takes the path of a YAML file")
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config!r} is not YAML: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{config!r} must hold 'name: value' lines, one an argument")
    for key in keys:
        if str(key) not in {*parser.flags, "env"}:
            raise ValueError(f"{config!r}: no such argument {str(key)!r}{parser.nearest(str(key))}")


def _dowser_config(arguments: Any) -> DowserConfig:
    values = {name: getattr(arguments, flag) for flag, name, _ in _dowser_fields()}
    values["rho_pattern"] = _mapping("rho_pattern", values["rho_pattern"])
    for name in ("target_modules", "exclude_modules"):
        values[name] = _names(values[name])
    return DowserConfig(**values)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--{name} takes a JSON object such as '{{\"down_proj\": 0.05}}', got {value!r}")
    return found


def _names(value: list[str] | str | None) -> list[str] | str | None:
    """Module names as a list; 'all-linear', or one value with more than a name's characters, is a regex."""
    if value is None:
        return None
    names = [value] if isinstance(value, str) else list(value)
    if len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0]):
        return names[0]
    return names


def flag_help(every: bool) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Flags by group, for the help: rows of flag, default and description.

    Args:
        every: all of TRL's flags with all of their help, not the usual ones in a sentence each.
    """
    parser = _Parser(lambda message: _raise(ValueError(message)))
    flags, groups = parser.flags, dict(parser.groups)
    own = {*groups["Dowser"], *(each.name for each in dataclasses.fields(DataArguments))}
    if every:
        shown = {name for names in groups.values() for name in names}
        groups["Further arguments of TRL"] = [n for n in flags if n not in shown and not _HIDDEN.fullmatch(n)]
    for title, names in groups.items():
        yield title, [_help_row(name, flags[name], every or name in own) for name in names]


def _help_row(name: str, action: Any, whole: bool) -> tuple[str, str, str]:
    text = " ".join(_HELP.get(name, action.help or "").replace("%%", "%").split())
    if not whole and name not in _HELP:
        text = re.split(r"(?<=[a-z`'\"\])]\.) ", text, maxsplit=1)[0]
    default = action.default
    if default in (None, "", [], {}) or name in _HELP and default is False:
        return f"--{name}", "", text
    return f"--{name}", str(getattr(default, "value", default)).lower(), text


def _raise(error: Exception) -> NoReturn:
    raise error
