"""NVILA, whose own code asks for conversations with images in them, and splices image features into the text itself.

Written after the remote code that comes with the checkpoints (``auto_processor.py`` and ``modeling_vila.py`` of
NVILA-Lite-2B): the processor returns ``input_ids`` and a dictionary ``media`` with the tiles of all images, in their
order; ``forward`` takes both, drops padding and puts its own, on the side that its tokenizer says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.forgetting.methods import Batch
from benchmarks.forgetting.real.examples import Example
from benchmarks.forgetting.real.subject import Subject, joined
from dowser_peft.miniature.training import IGNORED_LABEL


class Vila(Subject):
    """NVILA with its own processor, which works on the GPU: no worker processes."""

    can_collate_in_workers = False

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.dtype = model.dtype
        self._pad = getattr(processor, "pad_token_id", None)

    @property
    def pad_id(self) -> int:
        return super().pad_id if self._pad is None else self._pad

    def questions(self, examples: Sequence[Example]) -> Batch:
        return self._batch(examples, [[] for _ in examples], learns=False)

    def lessons(self, examples: Sequence[Example]) -> Batch:
        return self._batch(examples, self.answer_ids(examples), learns=True)

    def _batch(self, examples: Sequence[Example], answers: list[list[int]], learns: bool) -> Batch:
        prompts, media, settings = [], {}, {}
        for example in examples:
            turn = {"from": "human", "value": [example.image, example.question]}
            asked = self.processor(conversation=[[turn]])
            prompts.append(asked["input_ids"][0].cpu())
            for name, tiles in asked["media"].items():
                media.setdefault(name, []).extend(self._typed(tile) for tile in tiles)
            for name, options in asked["media_config"].items():
                for key, values in options.items():  # lists with an entry for each image
                    settings.setdefault(name, {}).setdefault(key, []).extend(values)
        found = {
            "input_ids": joined(prompts, answers, self.pad_id),
            "attention_mask": joined([torch.ones_like(prompt) for prompt in prompts], _ones(answers), 0).bool(),
            "media": media,
            "media_config": {name: settings.get(name, {}) for name in media},
        }
        if not learns:
            return found
        ignored = [torch.full_like(prompt, IGNORED_LABEL) for prompt in prompts]
        # Packing would cut the rows of the batch apart again for an attention that may not be installed.
        return found | {"labels": joined(ignored, answers, IGNORED_LABEL), "packing": False}

    def _generate(self, model: Any, batch: Batch, config: GenerationConfig) -> Tensor:
        self.tokenizer.padding_side = model.tokenizer.padding_side = "left"
        try:
            return model.generate(**batch, generation_config=config, return_output_ids_only=True)
        finally:
            self.tokenizer.padding_side = model.tokenizer.padding_side = "right"


def _ones(rows: list[list[int]]) -> list[list[int]]:
    return [[1] * len(row) for row in rows]
