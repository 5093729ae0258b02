"""What would fail only after the probe, which takes long: settings are tried before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import get_token, is_offline_mode
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available
from trl import SFTConfig, is_conversational
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

_POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm")
_LOADS_LATER = ("flyte",)  # transformers lists no availability of it


def check_settings(training: SFTConfig) -> None:
    """Refuse settings that the trainer would refuse once the weights are chosen.

    Raises:
        ValueError: if a number is out of range, a tracker is unknown, or an upload cannot work.
        ImportError: if a package is missing.
    """
    for name in _POSITIVE:
        if getattr(training, name) < 1:
            raise ValueError(f"--{name} must be positive, got {getattr(training, name)}")
    for name in _NOT_NEGATIVE:
        if (value := getattr(training, name)) is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name} must be a number of at least 0, got {value}")
    if training.max_steps <= 0 and training.num_train_epochs <= 0:
        raise ValueError(f"--num_train_epochs {training.num_train_epochs} leaves nothing to train")
    trackers: Any = training.report_to or []
    trackers = [trackers] if isinstance(trackers, str) else trackers
    get_reporting_integration_callbacks(trackers)  # raises on unknown names
    known = {*get_available_reporting_integrations(), *_LOADS_LATER, "none", "all"}
    if missing := [name for name in trackers if name not in known]:
        raise ImportError(
            f"--report_to {missing[0]} needs the package of that tracker, which is not installed: install it, or pass "
            "--report_to none"
        )
    if training.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("--use_liger_kernel needs a package: pip install liger-kernel, or leave it out")
    if training.push_to_hub and is_offline_mode():
        raise ValueError("--push_to_hub needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave the flag out")
    if training.push_to_hub and not (training.hub_token or get_token()):
        raise ValueError("--push_to_hub needs a token of the hub: run `hf auth login`, or leave the flag out")


def check_assistant_only(training: SFTConfig, example: dict[str, Any], name: str, processor: Any = None) -> None:
    """Refuse a loss on the assistant's words alone where nothing tells which they are.

    Args:
        training: the settings.
        example: of the training data.
        name: of the model.
        processor: its processor or tokenizer, once loaded.

    Raises:
        ValueError: if the data are no conversations, or the chat template does not mark the assistant's words.
    """
    if not training.assistant_only_loss:
        return
    if not is_conversational(example):
        columns = ", ".join(map(repr, example))
        raise ValueError(
            f"--assistant_only_loss needs conversations ('messages'), and the data have {columns}: "
            "leave it out; of 'prompt' and 'completion' the loss is on the completion anyway"
        )
    if processor is None or training.chat_template_path:
        return
    template = getattr(processor, "chat_template", None)
    if template and not has_generation_markers(template):
        try:
            get_training_chat_template(processor)  # of well-known models TRL has one with markers
        except ValueError as error:
            raise ValueError(
                f"--assistant_only_loss: the chat template of {name!r} does not mark what the assistant says. Put "
                "{% generation %} and {% endgeneration %} around it in chat_template.jinja (or 'chat_template' in "
                "tokenizer_config.json) of a local copy; or give the data as 'prompt' and 'completion'; or pass "
                "--assistant_only_loss false, for a loss on every token"
            ) from error
