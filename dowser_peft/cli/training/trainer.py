"""TRL's SFTTrainer for a Dowser adapter: values in float32, a model card that tells how to load it, held-out data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, DataCollatorForVisionLanguageModeling

from dowser_peft import DowserConfig
from dowser_peft.cli.models import ADAPTER_CONFIG
from dowser_peft.cli.training.data import has_images
from dowser_peft.model_card import complete_model_card, complete_trl_card

_LOOKED_AT = 8  # examples with images: they are collated while training, so only some are tried before


class DowserTrainer(SFTTrainer):
    """Arguments as of TRL's SFTTrainer."""

    args: SFTConfig
    model: Any  # a PeftModel
    processing_class: Any
    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.retention: dict[str, Any] | None = None  # what the model card is to say about it
        super().__init__(*args, **kwargs)
        # TRL rounds what trains over a quantised base to bfloat16, where small updates are lost.
        if not self.is_deepspeed_enabled:
            self.model.base_model._cast_adapter_dtype("default")

    @property
    def dowser_config(self) -> DowserConfig:
        """Of the adapter that trains."""
        return self.model.peft_config["default"]

    def adapter(self, enabled: bool) -> AbstractContextManager[Any]:
        """Within it the adapter is on, or off as in the base."""
        return nullcontext() if enabled else self.model.disable_adapter()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes its card at each checkpoint and before an upload, over the one that saving completed."""
        super().create_model_card(*args, **kwargs)
        folder = Path(str(self.args.output_dir))
        if not self.is_world_process_zero():
            return
        complete_trl_card(folder, self.dowser_config.base_model_name_or_path)
        if (folder / ADAPTER_CONFIG).is_file():
            complete_model_card(folder, self.dowser_config.to_dict(), self.retention)

    def prepare_held_out(self, dataset: Dataset) -> Dataset:
        """Text is tokenised as the training data is; images are left to the collator."""
        if has_images(dataset[0]):
            return dataset
        as_trained = self.completion_only_loss
        self.completion_only_loss = self._only_completions(dataset[0])
        try:
            prepared = self._prepare_dataset(dataset, self.processing_class, self.args, False, None, "retention")
        finally:
            self.completion_only_loss = as_trained
        if not len(prepared):
            raise ValueError(
                f"--max_length {self.args.max_length} cuts off the answer of every example of the retention data"
            )
        return prepared

    def held_out_collator(self, example: dict[str, Any]) -> Callable[[list[dict[str, Any]]], Any]:
        """What makes batches of the examples of :meth:`prepare_held_out`, like this one."""
        if not has_images(example):
            return DataCollatorForLanguageModeling(pad_token_id=self._tokenizer.pad_token_id)
        return DataCollatorForVisionLanguageModeling(
            processor=self.processing_class,
            max_length=self.args.max_length,
            completion_only_loss=self._only_completions(example),
            dataset_text_field=self.args.dataset_text_field,
            assistant_only_loss=self.args.assistant_only_loss and "messages" in example,
            chat_template=self.chat_template,
        )

    @property
    def image_token_id(self) -> int | None:
        """Id of the token in whose places pictures are, which no model is meant to predict."""
        token = getattr(self.processing_class, "image_token", None)
        return self._tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None

    def _only_completions(self, example: dict[str, Any]) -> bool:
        return "completion" in example and self.args.completion_only_loss is not False


def check_processor(
    name: str, processor: Any, model: PreTrainedModel, example: dict[str, Any], text_field: str
) -> None:
    """Refuse images that the model has no place for.

    Raises:
        ValueError: if there is no processor, it has no token for images, or the text has none of them.
    """
    if not has_images(example):
        return
    column = "images" if "images" in example else "image"
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"the data has images (column {column!r}), but {name!r} comes with no processor for them, only with a "
            f"{type(processor).__name__}: it is no vision-language model, or its folder lacks processor_config.json"
        )
    tokenizer: Any = processor.tokenizer
    token = getattr(processor, "image_token", None)
    if token is None:
        index = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
        token = tokenizer.convert_ids_to_tokens(index) if index is not None else None
    if not isinstance(token, str) or token not in tokenizer.get_vocab():
        raise ValueError(
            f"the data has images (column {column!r}), but the processor of {name!r} has no image token"
            + (f": {token!r} is not in its vocabulary" if isinstance(token, str) else "")
        )
    text = example.get("prompt", example.get(text_field))
    images = example[column]
    places = [token, getattr(processor, "boi_token", None) or token]
    if isinstance(text, str) and images and "messages" not in example and not any(place in text for place in places):
        raise ValueError(
            f"the first example has an image, but its text has no {places[1]!r} where the image goes; write it there, "
            "or use conversations ('messages'), in which it is put before the first question"
        )


def warn_about_compute_dtype(model: PreTrainedModel, args: SFTConfig) -> None:
    """A 4-bit base multiplies in the dtype that it was loaded for, whatever the training runs in."""
    settings = getattr(model.config, "quantization_config", None)
    compute = getattr(settings, "bnb_4bit_compute_dtype", None)
    wanted = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if not getattr(settings, "load_in_4bit", False) or wanted is None or compute == wanted:
        return
    name, other = (str(dtype).removeprefix("torch.") for dtype in (compute, wanted))
    warnings.warn(
        f"the 4-bit base computes in {name} (bnb_4bit_compute_dtype), the training in {other}: the frozen layers are "
        f"{'slower than they need be' if compute == torch.float32 else 'rounded or overflow differently'}. Pass "
        f"--dtype {other}, or load a checkpoint that was quantised for it",
        stacklevel=2,
    )


def settle_unused_parameters(args: SFTConfig, model: PreTrainedModel, processor: Any, config: DowserConfig) -> None:
    """Do not let DDP look for unused parameters in every step, as it does for a PeftModel, where there can be none.

    There can be with experts that get no token, a vision tower that gets no picture, modules saved in full, and layers
    that are skipped at random; a setting of the user's holds.
    """
    has_experts = any("experts" in name.rpartition(".")[2] for name, _ in model.named_modules())
    skips = any(getattr(model.config, name, 0) for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"))
    if args.ddp_find_unused_parameters is None and not (
        has_experts or skips or isinstance(processor, ProcessorMixin) or config.modules_to_save
    ):
        args.ddp_find_unused_parameters = False


def check_examples(trainer: DowserTrainer, given: int | None) -> None:
    """Refuse data of which nothing is left to train on.

    Args:
        trainer: with the prepared data.
        given: how many examples there were before; None for a stream.

    Raises:
        ValueError: if ``max_length`` cuts off every answer.
    """
    cut = f"--max_length {trainer.args.max_length} cuts off the answer of"
    if trainer._is_vision_dataset:
        rows = [row for row, _ in zip(iter(trainer.train_dataset), range(_LOOKED_AT), strict=False)]
        lost = sum(bool((trainer.data_collator([row])["labels"] == -100).all()) for row in rows)
        if lost == len(rows):
            raise ValueError(f"{cut} each of the first {lost} examples: nothing would train. Raise it")
        if lost:
            warnings.warn(f"{cut} {lost} of the first {len(rows)} examples: these train nothing", stacklevel=2)
        return
    if given is None or trainer.args.packing:
        return
    left = len(trainer.train_dataset)
    if not left:
        raise ValueError(f"{cut} every example: nothing would train. Raise it, or shorten the prompts")
    if left < given:
        warnings.warn(f"{cut} {given - left} of {given} examples: these are left out", stacklevel=2)
