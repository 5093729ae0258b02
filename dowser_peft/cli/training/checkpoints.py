"""Where a run writes, and what it goes on from: all of it checked before anything is trained or written."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.trainer_pt_utils import safe_globals

from dowser_peft import DowserConfig
from dowser_peft.cli.adapter_report import module_names
from dowser_peft.cli.models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, adapter_folder
from dowser_peft.injection import resolve_targets

if TYPE_CHECKING:
    from transformers import Trainer

STATE = "trainer_state.json"  # written last: a checkpoint that has it is complete
_OPTIMIZER = "optimizer.pt"
_SCHEDULER = "scheduler.pt"
_RANDOM = "rng_state*.pth"
# What decides which weights train, and so the shapes of everything in a checkpoint. The rest only matters while the
# weights are chosen, which a resumed run does not do again. What is targeted is compared on the model.
_MUST_AGREE = ("granularity", "rho", "rho_pattern", "num_last_layers", "bias", "modules_to_save")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_OLDER = "go on from an older checkpoint, --resume_from_checkpoint FOLDER"
# Of these states each tensor has the shape of its parameter.
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def find_checkpoint(output: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, or None for a new run; refuses to write over what is there.

    Args:
        output: folder of the run.
        resume: 'true' for the latest in ``output``, or a folder; None for a new run.

    Raises:
        OSError: if ``output`` is a file, or not empty without a checkpoint in it to go on from.
        ValueError: if there is no complete checkpoint.
    """
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output_dir {str(output)!r} is a file: choose a folder")
    checkpoints = _checkpoints(output)
    occupied = output.is_dir() and any(output.iterdir())
    wanted = (resume or "").lower()
    if wanted in ("", "false", "none"):
        if occupied:
            latest = f" to go on from {checkpoints[-1].name}" if checkpoints else ""
            hint = f"pass --resume_from_checkpoint true{latest}, or " if checkpoints else ""
            raise FileExistsError(f"--output_dir {str(output)!r} is not empty: {hint}choose another folder")
        return None
    if wanted == "true":
        complete = [folder for folder in checkpoints if _is_complete(folder)]
        if not complete:
            defects = "".join(f" ({folder.name}: {_defect(folder)})" for folder in checkpoints[-1:])
            raise ValueError(
                f"--resume_from_checkpoint true: {str(output)!r} has no complete checkpoint{defects}; leave it out, "
                "and choose an empty folder, to begin anew"
            )
        if complete[-1] != checkpoints[-1]:
            warnings.warn(
                f"{checkpoints[-1].name} is not complete, as after a crash while it was written "
                f"({_defect(checkpoints[-1])}): going on from {complete[-1].name}",
                stacklevel=2,
            )
        return complete[-1]
    folder = Path(str(resume)).expanduser()
    if not _is_complete(folder):
        there = f"; {str(output)!r} has {', '.join(path.name for path in checkpoints)}" if checkpoints else ""
        raise ValueError(f"{str(folder)!r} is no complete checkpoint of a Dowser adapter ({_defect(folder)}){there}")
    if occupied and folder.resolve().parent != output.resolve():
        raise FileExistsError(
            f"--output_dir {str(output)!r} is not empty, and the checkpoint {str(folder)!r} is of another run: choose "
            "another folder"
        )
    return folder


def _checkpoints(output: Path) -> list[Path]:
    found = [path for path in output.glob("checkpoint-*") if path.name.partition("-")[2].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _is_complete(folder: Path) -> bool:
    return _defect(folder) is None


def _defect(folder: Path) -> str | None:
    """What keeps a folder from being a complete checkpoint."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE):
        if not (folder / name).is_file():
            return f"it has no {name}"
    try:
        whole = "global_step" in json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        whole = False
    return None if whole else f"its {STATE} is damaged"


def check_same_adapter(checkpoint: Path, asked: DowserConfig) -> None:
    """Refuse to go on with an adapter that trains other weights than the command asks for.

    Raises:
        ValueError: naming both values, or if the files of the adapter are damaged.
    """
    saved = adapter_config(adapter_folder(str(checkpoint)))
    for name in _MUST_AGREE:
        there, here = _comparable(getattr(saved, name)), _comparable(getattr(asked, name))
        if there == here:
            continue
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} was trained with {name} = {there!r}, and this run asks for {here!r}: "
            f"pass --{name} as in that run, or begin a new one in another folder"
        )


def check_same_targets(checkpoint: Path, asked: DowserConfig, model: nn.Module) -> None:
    """Refuse to go on with an adapter of other modules or parameters than the command asks for.

    A checkpoint names its modules one by one, or by a regex of exactly them, so both are compared on the model.

    Args:
        checkpoint: its folder.
        asked: what the command asks for; left as it is.
        model: the base model, without adapters.

    Raises:
        ValueError: naming what is asked for and the first difference.
    """
    saved = _targets(model, adapter_config(adapter_folder(str(checkpoint))))
    wanted = _targets(model, asked)
    for flag, flags, there, here in zip(
        ("target_modules", "target_parameters"), (_TARGETS, ("target_parameters",)), saved, wanted, strict=True
    ):
        if set(there) == set(here):
            continue
        value = _comparable(getattr(asked, flag))
        first = min(set(there) ^ set(here))
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} was trained with {flag} = {there!r}, and this run asks for "
            f"{'the default ones' if value is None else repr(value)} (only {'there' if first in there else 'here'}: "
            f"{first!r}): pass {', '.join('--' + each for each in flags)} as in that run, or begin a new one in "
            "another folder"
        )


def check_adapter_file(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a file that lacks a module, or whose values are no numbers, as after a diverged or damaged run.

    Raises:
        ValueError: naming the file and the module.
    """
    file = checkpoint / ADAPTER_WEIGHTS
    adapted = set().union(*_targets(model, adapter_config(adapter_folder(str(checkpoint)))))
    if missing := sorted(adapted - set(module_names(checkpoint))):
        raise ValueError(f"the adapter file {str(file)!r} is damaged: it has no values for {missing[0]!r}; {_OLDER}")
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118  no mapping
            tensor = opened.get_tensor(key)
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"the adapter file {str(file)!r} holds NaN or infinity in {key!r}; {_OLDER}")


def check_other_states(checkpoint: Path) -> None:
    """Refuse states of the schedule and of random numbers that cannot be read.

    Raises:
        ValueError: naming the file.
    """
    for file in (checkpoint / _SCHEDULER, *sorted(checkpoint.glob(_RANDOM))):
        if file.is_file():
            with safe_globals():
                _read_state(file, "state")


def _read_state(file: Path, what: str, **options: Any) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # of pickle, zipfile or torch: all mean that it cannot be read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the {what} {str(file)!r} is damaged: {reason}; {_OLDER}") from error


def _targets(model: nn.Module, config: DowserConfig) -> tuple[list[str], list[str]]:
    """Modules and fused parameters of a configuration, which stays as it is."""
    config = copy.deepcopy(config)
    by_default = config.target_modules is None and config.target_parameters is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the adapter was made
        return resolve_targets(model, config, by_default)


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list) else value


def check_optimizer_state(checkpoint: Path, trainer: Trainer) -> None:
    """Refuse an optimizer state that the optimizer of this run cannot take.

    Raises:
        ValueError: if it is damaged, or of another optimizer or other weights.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return  # sharded files, which these check themselves
    file = checkpoint / _OPTIMIZER
    if not file.is_file():
        warnings.warn(f"{checkpoint.name} has no {_OPTIMIZER}: the optimizer starts without its moments", stacklevel=2)
        return
    saved = _read_state(file, "optimizer state", mmap=True)
    try:
        groups, states = saved["param_groups"], saved["state"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the optimizer state {str(file)!r} is damaged: it has no {error}; {_OLDER}") from error
    optimizer = trainer.create_optimizer()
    trainer.optimizer = None  # loading the checkpoint may replace parameters: training makes its own
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    asked = f"--optim {getattr(trainer.args.optim, 'value', trainer.args.optim)}"
    here, there = (
        set().union(*settings) - {"initial_lr"} for settings in (optimizer.state_dict()["param_groups"], groups)
    )
    differing = sorted(here ^ there)
    if not (here <= there or there <= here):  # another version of torch may know more settings, or fewer
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} holds the state of another optimizer than {asked} (only one of them "
            f"has {', '.join(differing)}): pass the --optim of the run that wrote it"
        )
    sizes = [[len(group["params"]) for group in groups_of] for groups_of in (optimizer.param_groups, groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the checkpoint {str(checkpoint)!r} holds optimizer states of {sizes[1]} tensors, this run trains "
            f"{sizes[0]}: it is of another run"
        )
    for index, parameter in enumerate(parameters):
        for name, tensor in states.get(index, {}).items():
            if name in _LIKE_PARAMETER and tensor.shape != parameter.shape:
                raise ValueError(
                    f"the checkpoint {str(checkpoint)!r} holds {name!r} of shape {tuple(tensor.shape)} for a tensor "
                    f"of shape {tuple(parameter.shape)}: it is of a run with another rho or another model"
                )
