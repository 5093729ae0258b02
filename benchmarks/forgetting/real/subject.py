"""A model with its processor, as the benchmark needs it: batches to learn from, batches to answer, answers.

Whatever has a processor with a chat template (LLaVA and most models of transformers) is a :class:`Subject`; NVILA,
whose own code has a language of its own, is one of :mod:`benchmarks.forgetting.real.vila`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, GenerationConfig, PreTrainedModel

from benchmarks.forgetting.methods import Batch
from benchmarks.forgetting.real.examples import Example
from dowser_peft.cli.models import Source, load_model
from dowser_peft.miniature.training import IGNORED_LABEL
from dowser_peft.targets import language_model


class Subject:
    """A model whose processor has a chat template.

    Args:
        model: as loaded.
        processor: of images and text.
    """

    can_collate_in_workers = True

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.dtype = model.dtype
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(
                f"the processor of {model.config._name_or_path!r} has no chat template, so that it is not known how "
                "to ask the model; the models of llava-hf on the hub have one"
            )
        # LLaVA-1.5 was trained and is evaluated on images padded to squares; its processor crops them instead.
        self._pads = model.config.model_type == "llava"

    def questions(self, examples: Sequence[Example]) -> Batch:
        """Questions alone, padded on the left."""
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}],
                add_generation_prompt=True,
            )
            for example in examples
        ]
        images = [[self._prepared(example.image)] for example in examples]
        has_bos = self.tokenizer.bos_token is not None and texts[0].startswith(self.tokenizer.bos_token)
        self.tokenizer.padding_side = "left"
        batch = self.processor(
            text=texts, images=images, padding=True, return_tensors="pt", add_special_tokens=not has_bos
        )
        return {name: self._typed(value) for name, value in batch.items()}

    def lessons(self, examples: Sequence[Example]) -> Batch:
        """Questions with their answers, padded on the right; labels cover the answer and its EOS."""
        batch = self.questions(examples)
        answers = self.answer_ids(examples)
        prompt, mask = batch["input_ids"], batch["attention_mask"].bool()
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.shape == prompt.shape:
                fill = {"attention_mask": 1}.get(name, 0)
                rows = [row[real] for row, real in zip(value, mask, strict=True)]
                ends = answers if name == "input_ids" else [[fill] * len(answer) for answer in answers]
                pad = self.pad_id if name == "input_ids" else 0
                batch[name] = joined(rows, ends, pad)
        asked = [torch.full((int(real.sum()),), IGNORED_LABEL) for real in mask]
        return batch | {"labels": joined(asked, answers, IGNORED_LABEL)}

    def answer_ids(self, examples: Sequence[Example]) -> list[list[int]]:
        """Tokens of each answer to learn, and EOS."""
        texts = [example.references[0] for example in examples]
        found = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [ids + [self.tokenizer.eos_token_id] for ids in found]

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch, new_tokens: int) -> list[str]:
        """What ``model`` answers, greedily."""
        device = next(model.parameters()).device
        written = self._generate(model, send_to_device(batch, device), self._greedy(new_tokens))
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    @property
    def pad_id(self) -> int:
        found = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if found is None else found

    def _generate(self, model: Any, batch: Batch, config: GenerationConfig) -> Tensor:
        return model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]

    def _greedy(self, new_tokens: int) -> GenerationConfig:
        """Plain greedy decoding, whatever the model's own configuration asks for, up to its end tokens."""
        own = getattr(self.model, "generation_config", None)
        end = getattr(own, "eos_token_id", None) or self.tokenizer.eos_token_id
        return GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, use_cache=True, eos_token_id=end, pad_token_id=self.pad_id
        )

    def _prepared(self, image: Image.Image) -> Image.Image:
        if not self._pads:
            return image
        mean = getattr(self.processor.image_processor, "image_mean", (0.5, 0.5, 0.5))
        return squared(image, tuple(round(255 * channel) for channel in mean))

    def _typed(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def squared(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square."""
    size = max(image.size)
    found = Image.new("RGB", (size, size), colour)
    found.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return found


def joined(begins: Sequence[Tensor], ends: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Each beginning and end in a row, ``[rows, longest]``, padded on the right."""
    rows = [torch.cat([begin, begin.new_tensor(end)]) for begin, end in zip(begins, ends, strict=True)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def load(source: Source, dtype: str, device: torch.device) -> Subject:
    """A subject with its model on ``device``, in evaluation mode, its decoder recomputing activations in training.

    Raises:
        OSError: if there is no such model, or it needs an account.
        ValueError: if it cannot be loaded.
    """
    from benchmarks.forgetting.real.vila import Vila

    model = load_model(source, dtype).to(device)
    _, decoder = language_model(model)
    (decoder if isinstance(decoder, PreTrainedModel) else model).gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    processor = AutoProcessor.from_pretrained(source.path, **source.options)
    is_vila = "media" in inspect.signature(model.forward).parameters
    return Vila(model, processor) if is_vila else Subject(model, processor)
