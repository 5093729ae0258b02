"""A run from arguments to saved adapter: everything that can be refused is refused before a step is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel
from trl import get_quantization_config

from dowser_peft.cli.common import note, shows_progress
from dowser_peft.cli.models import Source, load_model
from dowser_peft.cli.training.arguments import Arguments, dtype_of
from dowser_peft.cli.training.checkpoints import (
    STATE,
    check_adapter_file,
    check_optimizer_state,
    check_other_states,
    check_same_adapter,
    check_same_targets,
    find_checkpoint,
)
from dowser_peft.cli.training.data import load_data
from dowser_peft.cli.training.retention import held_out, measure, report
from dowser_peft.cli.training.settings import check_assistant_only, check_settings
from dowser_peft.cli.training.trainer import (
    DowserTrainer,
    check_examples,
    check_processor,
    settle_unused_parameters,
    warn_about_compute_dtype,
)
from dowser_peft.model_card import complete_model_card
from dowser_peft.storage import write_text
from dowser_peft.tuner_layer import layers_with

RETENTION_FILE = "retention.json"


def run(arguments: Arguments) -> dict[str, Any] | None:
    """Train, save and evaluate.

    Returns:
        What to print; None in all processes but the first.

    Raises:
        ValueError: if something does not fit; nothing was trained or written then.
        OSError: if something is missing, or would be overwritten.
    """
    training, data = arguments.training, arguments.data
    check_settings(training)
    output = Path(str(training.output_dir))
    checkpoint = find_checkpoint(output, training.resume_from_checkpoint)
    training.resume_from_checkpoint = str(checkpoint) if checkpoint else None
    if checkpoint is not None:
        check_same_adapter(checkpoint, arguments.dowser)
        check_other_states(checkpoint)
    if data.retention_dataset and arguments.dowser.bias != "none":
        raise ValueError(
            "--retention_dataset needs --bias none: trained biases stay when the adapter is disabled, so there is no "
            "base to measure"
        )
    PartialState().wait_for_everyone()  # all have looked at the folder before one writes to it
    train_data, eval_data, retention_data = _load_data(arguments)
    source = Source(
        str(arguments.model.model_name_or_path), arguments.model.model_revision, training.trust_remote_code
    )
    first = next(iter(train_data))
    check_assistant_only(training, first, source.name)
    processor = _load_processor(source)
    check_assistant_only(training, first, source.name, processor)
    model: Any = _load_model(source, arguments)
    warn_about_compute_dtype(model, training)
    for examples in (train_data, retention_data):
        if examples is not None:
            check_processor(source.name, processor, model, next(iter(examples)), training.dataset_text_field)
    config = arguments.dowser
    config.revision = _revision(model, source)
    settle_unused_parameters(training, model, processor, config)
    if checkpoint is not None:  # its masks: nothing is probed again
        check_same_targets(checkpoint, config, model)
        check_adapter_file(checkpoint, model)
        model = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
        model.peft_config["default"].save_dtype = config.save_dtype
    trainer = DowserTrainer(
        model=model,
        args=training,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=processor,
        peft_config=config if checkpoint is None else None,
    )
    check_examples(trainer, len(train_data) if isinstance(train_data, Dataset) else None)
    if checkpoint is not None:
        check_optimizer_state(checkpoint, trainer)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    base = None
    if retention_data is not None:
        retention_data = trainer.prepare_held_out(retention_data)
        base = None if sharded else measure(trainer, retention_data, adapted=False)
    begun = int(json.loads((checkpoint / STATE).read_text())["global_step"]) if checkpoint else 0
    trained = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    stood_still = trainer.state.global_step <= begun
    is_first = trainer.is_world_process_zero()
    if stood_still and is_first:
        note(f"nothing left to train: the run has its {begun} steps; raise --max_steps or --num_train_epochs")
    trainer.save_model(str(output))
    trainer.save_state()
    if retention_data is not None:
        base = base or measure(trainer, retention_data, adapted=False)
        tuned = measure(trainer, retention_data, adapted=True)
        trainer.retention = report(str(data.retention_dataset), data.retention_split, base, tuned)
    if is_first and trainer.retention is not None:
        write_text(output / RETENTION_FILE, json.dumps(trainer.retention, indent=2) + "\n")
        complete_model_card(output, trainer.dowser_config.to_dict(), trainer.retention)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
    result = {
        "output": str(output),
        "base": source.name,
        "resumed_from": training.resume_from_checkpoint,
        "trained": sum(layer.dowser_values["default"].numel() for layer in layers_with(trainer.model, "default")),
        "examples": len(train_data) if isinstance(train_data, Dataset) else None,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss": None if stood_still else trained.training_loss,
        "retention": trainer.retention,
        "seconds": round(trained.metrics["train_runtime"], 3),
    }
    # DDP's wrapper holds the process group, and freed after the group it waits for gloo's threads for ever.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # trackers and process group
    return result if is_first else None


def _load_data(arguments: Arguments) -> tuple[Any, Any, Dataset | None]:
    """Data to train on, to evaluate on and to measure retention on."""
    script, data, text_field = arguments.script, arguments.data, arguments.training.dataset_text_field
    name, config = str(script.dataset_name), script.dataset_config
    options: dict[str, Any] = {"image_folder": data.image_folder, "streaming": script.dataset_streaming}
    if not shows_progress():
        datasets.disable_progress_bars()
    with arguments.training.main_process_first():  # the others read what it cached
        train = load_data(name, config, script.dataset_train_split, text_field, **options)
        evaluation = None
        if str(getattr(arguments.training.eval_strategy, "value", arguments.training.eval_strategy)) != "no":
            evaluation = load_data(name, config, script.dataset_test_split, text_field, **options)
        retention = None
        if data.retention_dataset:
            kept, kept_config = data.retention_dataset, data.retention_config
            found = load_data(kept, kept_config, data.retention_split, text_field, **options)
            data.retention_split = data.retention_split or str(found.split)
            if (kept, kept_config, data.retention_split) == (name, config, script.dataset_train_split):
                raise ValueError(
                    f"the retention data are the training data ({name!r}, split {data.retention_split!r}): name "
                    "another dataset, or another --retention_split"
                )
            retention = held_out(found, data.retention_examples)
    return train, evaluation, retention


def _load_processor(source: Source) -> Any:
    """The processor of a model that has one, else its tokenizer."""
    try:
        return AutoProcessor.from_pretrained(source.path, **source.options)
    except (OSError, ValueError, KeyError) as error:
        lacking = "no tokenizer or processor that could be loaded"
        with contextlib.suppress(OSError, ValueError, KeyError):
            AutoTokenizer.from_pretrained(source.path, **source.options)
            lacking = (
                "a tokenizer, but no processor that could be loaded: copy processor_config.json and "
                "preprocessor_config.json of the image processor from the original model"
            )
        raise ValueError(f"{source.name!r} comes with {lacking}: {error}") from error


def _load_model(source: Source, arguments: Arguments) -> PreTrainedModel:
    computing = arguments.model
    if computing.dtype == "auto":  # of the weights as they are stored: a 4-bit base has to be told what it computes in
        computing = dataclasses.replace(computing, dtype=dtype_of(arguments.training))
    quantisation = get_quantization_config(computing)
    given: Any = arguments.training.model_init_kwargs  # a string of JSON is a dict by now
    options: dict[str, Any] = dict(given or {})
    if arguments.model.attn_implementation:
        options["attn_implementation"] = arguments.model.attn_implementation
    if quantisation is not None:
        options["quantization_config"] = quantisation
    state = PartialState()
    device_map = options.pop("device_map", None)
    if device_map is None and state.device.type not in ("cpu", "mps"):
        if state.num_processes == 1:
            device_map = "auto"
        elif quantisation is not None:
            device_map = {"": state.local_process_index}
    dtype = options.pop("dtype", arguments.model.dtype)
    arguments.training.model_init_kwargs = None
    model = load_model(source, dtype, device_map, **options)
    if str(dtype) == "float16" and arguments.training.bf16:
        warnings.warn("--dtype float16 in bfloat16 training: large weights and activations may overflow", stacklevel=2)
    return model


def _revision(model: PreTrainedModel, source: Source) -> str | None:
    """The commit of a model from the hub, so that the adapter is never merged into another; None for a folder."""
    if source.is_local:
        return None
    return getattr(model.config, "_commit_hash", None) or source.revision
