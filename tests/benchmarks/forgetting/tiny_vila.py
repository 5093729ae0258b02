"""A tiny NVILA with code of its own, written into a checkpoint's folder by tests: the interface of the real one.

The processor takes conversations with images in them and gives ``input_ids`` and ``media``; the model splices image
features in place of their token, drops padding and puts its own, on the side that its tokenizer says.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE, IGNORED = 5, -100


class TinyVilaConfig(PreTrainedConfig):
    model_type = "tiny_vila"

    def __init__(self, llm: dict | None = None, vision: dict | None = None, **options: object) -> None:
        self.llm, self.vision = llm or {}, vision or {}
        super().__init__(**options)


class TinyVila(PreTrainedModel):
    config_class = TinyVilaConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: TinyVilaConfig) -> None:
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(Qwen2Config(**config.llm))
        self.vision_tower = SiglipVisionModel(SiglipVisionConfig(**config.vision))
        self.mm_projector = nn.Linear(config.vision["hidden_size"], config.llm["hidden_size"])
        self.tokenizer = AutoTokenizer.from_pretrained(Path(config._name_or_path) / "llm")
        self.post_init()

    def _embed(self, input_ids, media, labels, attention_mask):
        tiles = iter(media["image"])
        inputs, targets = [], []
        for row, ids in enumerate(input_ids):
            real = attention_mask[row]
            parts, wanted = [], []
            for token, label in zip(ids[real], labels[row][real], strict=True):
                if token == IMAGE:
                    features = self.vision_tower(next(tiles)[None].to(self.dtype)).last_hidden_state[0]
                    parts.append(self.mm_projector(features))
                    wanted.append(label.new_full((len(features),), IGNORED))
                else:
                    parts.append(self.llm.model.embed_tokens(token[None]))
                    wanted.append(label[None])
            inputs.append(torch.cat(parts))
            targets.append(torch.cat(wanted))
        if next(tiles, None) is not None:
            raise ValueError("not all images are consumed")
        side = self.tokenizer.padding_side
        masks = [torch.ones(len(row), dtype=torch.bool) for row in inputs]

        def pad(rows, value):
            return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        return pad(inputs, 0.0), pad(targets, IGNORED), pad(masks, False)

    def forward(
        self, input_ids, media=None, media_config=None, attention_mask=None, labels=None, packing=True, **kwargs
    ):
        if media is None:
            return self.llm(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        if packing and self.training:
            raise ValueError("packing needs flash attention")
        known = torch.full_like(input_ids, IGNORED) if labels is None else labels
        inputs, targets, mask = self._embed(input_ids, media, known, attention_mask)
        return self.llm(
            inputs_embeds=inputs, attention_mask=mask, labels=None if labels is None else targets, **kwargs
        )

    @torch.no_grad()
    def generate(self, input_ids=None, media=None, media_config=None, attention_mask=None, **options):
        if not options.pop("return_output_ids_only", False):
            raise ValueError("the prompt is returned too")
        inputs, _, mask = self._embed(input_ids, media, torch.full_like(input_ids, IGNORED), attention_mask)
        return self.llm.generate(inputs_embeds=inputs, attention_mask=mask, **options)


class TinyVilaProcessor(ProcessorMixin):
    attributes = []

    def __init__(self, image_processor=None, tokenizer=None, config=None, **kwargs) -> None:
        self.image_processor, self.tokenizer, self.config = image_processor, tokenizer, config
        self.pad_token_id = tokenizer.pad_token_id

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        folder = Path(path)
        images = CLIPImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)
        tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
        return cls(images, tokenizer, AutoConfig.from_pretrained(folder, trust_remote_code=True))

    def __call__(self, conversation=None, **kwargs):
        (turns,) = conversation
        image, text = turns[0]["value"]
        # The large one cuts wide images into tiles, each with a token of its own.
        tiles = [image] * (2 if image.width > 2 * image.height else 1)
        ids = self.tokenizer("USER: " + "<image>\n" * len(tiles) + text + " ASSISTANT:", return_tensors="pt")
        pixels = self.image_processor(tiles, return_tensors="pt")["pixel_values"].half()
        return {
            "input_ids": ids["input_ids"],
            "attention_mask": ids["attention_mask"].bool(),
            "media": {"image": list(pixels)},
            "media_config": {"image": {}},
        }
