"""Synthetic images: each prompt of a model that reads images is preceded by an image of noise.

Pixels are drawn from N(0, 1) where the vision tower reads them, behind the processor's normalisation. How an image is
laid out follows from the arguments of the model's ``get_image_features`` and from its config:

    whole      pixel_values [N, C, H, W]                                 LLaVA, PaliGemma, Gemma 3, InternVL
    list       [N, 1, C, H, W], with pixel_attention_mask                Idefics3, SmolVLM
    crops      [N, 1 + crops, C, H, W], with image_sizes                 LLaVA-NeXT, LLaVA-OneVision
    patches    [N * patches, C * frames * p * p], with image_grid_thw    Qwen-VL

and the size from the vision tower's config; one without a size of its own gets 16 x 16 tokens. How many tokens an
image takes, the model tells itself: one image is passed through ``get_image_features`` and what comes out is counted.
As many placeholders, with the markers of the config around them, go behind the first token of the prompt.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dowser_peft.probing.forward import Batch, probed_output, prompt_generator, ready_inputs, token_masks

_TOKENS_PER_SIDE = 16  # of an image whose size is free
_FIRST_IMAGE = 1 << 31  # numbers of images, as generators of their own; prompts, which draw signs, are fewer
_MARKERS = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("boi_token_id", "eoi_token_id"),
    ("boi_token_index", "eoi_token_index"),
)


@dataclass(frozen=True)
class _Layout:
    """One image.

    Args:
        shape: of its pixel_values.
        joined: whether images follow each other in the first dimension, instead of having one of their own.
        extra: further inputs of the model about it.
    """

    shape: tuple[int, ...]
    joined: bool = False
    extra: tuple[tuple[str, tuple[int, ...]], ...] = ()


class SyntheticImages:
    """One image of noise for each prompt; every prompt draws from a generator of its own.

    Raises:
        ValueError: if the model reads no images, or its kind of image is not known.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._model, self._seed = model, seed
        inputs = inspect.signature(model.forward).parameters
        if "pixel_values" not in inputs:
            raise ValueError(
                f"{type(model).__name__} takes no pixel_values: probe it without images (or, if it reads them under "
                "another name, with inputs that its processor made, probe(model, batches=...))"
            )
        self._takes = inputs
        # Its processor puts the image in front of BOS. Token types tell its prompts from answers, not text from image.
        self._is_paligemma = model.config.model_type == "paligemma"
        config: Any = model.config
        ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
        placeholder = next((value for value in ids if isinstance(value, int)), None)
        if placeholder is None or not hasattr(model, "get_image_features") or config.is_encoder_decoder:
            raise self._unknown()
        try:
            self._layout = _layout(model)
            count = self._count_tokens()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self._unknown() from error
        before, after = _markers(config)
        self._placeholder = placeholder
        self._tokens = torch.tensor([*before, *[placeholder] * count, *after])

    def _unknown(self) -> ValueError:
        return ValueError(
            f"how {type(self._model).__name__} reads an image is not known: probe it with inputs that its processor "
            "made, probe(model, batches=...), and pass importance=statistics; or probe it without images"
        )

    def _count_tokens(self) -> int:
        features: Any = self._model.get_image_features  # of any shape [..., hidden], or one tensor an image
        with torch.no_grad():
            found = features(**ready_inputs(self._model, self._images(0, 1)))
        found = getattr(found, "pooler_output", found)
        tensors = [found] if isinstance(found, torch.Tensor) else list(found)
        return sum(part.shape[:-1].numel() for part in tensors)

    def placed(self, inputs: dict[str, torch.Tensor], first_token: int | None) -> dict[str, torch.Tensor]:
        """``input_ids`` ``[N, T]`` with the tokens of an image behind ``first_token``, or in front without one."""
        ids = inputs["input_ids"]
        start = int(first_token is not None and not self._is_paligemma)
        image = self._tokens.to(ids.device).expand(ids.shape[0], -1)
        return inputs | {"input_ids": torch.cat([ids[:, :start], image, ids[:, start:]], 1)}

    def drawn(self, batch: Batch) -> Batch:
        """``batch`` with the images of its prompts, on the CPU, and with token types where the model takes them."""
        inputs = dict(batch.inputs)
        is_image = (inputs["input_ids"] == self._placeholder).long()
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self._takes and not self._is_paligemma:
                inputs[name] = is_image
        return Batch(
            inputs | self._images(batch.first_prompt, batch.num_prompts), batch.first_prompt, batch.num_prompts
        )

    def _images(self, first: int, count: int) -> dict[str, torch.Tensor]:
        generators = [prompt_generator(self._seed, _FIRST_IMAGE + prompt) for prompt in range(first, first + count)]
        pixels = [torch.randn(self._layout.shape, generator=generator) for generator in generators]
        values = torch.cat(pixels) if self._layout.joined else torch.stack(pixels)
        extra = {name: torch.tensor(value).expand(count, -1) for name, value in self._layout.extra}
        return {"pixel_values": values.to(self._model.dtype), **extra}

    def check(self, batch: Batch) -> None:
        """Try one forward pass.

        Raises:
            ValueError: if the model refuses it.
        """
        inputs = ready_inputs(self._model, batch.inputs)
        try:
            with torch.no_grad():
                probed_output(self._model, inputs, token_masks(self._model, inputs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise self._unknown() from error


def _layout(model: PreTrainedModel) -> _Layout:
    takes = inspect.signature(model.get_image_features).parameters  # type: ignore[arg-type]
    config: Any = model.config
    vision = config.vision_config
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    if "image_grid_thw" in takes:
        side = _TOKENS_PER_SIDE * vision.spatial_merge_size
        patch = channels * vision.temporal_patch_size * vision.patch_size**2
        return _Layout((side * side, patch), joined=True, extra=(("image_grid_thw", (1, side, side)),))
    size = vision.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    image = (channels, height, width)
    pinpoints = getattr(config, "image_grid_pinpoints", None)
    if "image_sizes" in takes and pinpoints:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        crops = image_size_to_num_patches((height, width), pinpoints, height)
        return _Layout((crops, *image), extra=(("image_sizes", (height, width)),))
    return _Layout((1, *image) if "pixel_attention_mask" in takes else image)


def _markers(config: Any) -> tuple[list[int], list[int]]:
    """What the config puts around an image."""
    vocabulary = config.get_text_config().vocab_size
    for names in _MARKERS:
        ids = [getattr(config, name, None) for name in names]
        if all(isinstance(value, int) and 0 <= value < vocabulary for value in ids):
            return [ids[0]], [ids[1]]  # type: ignore[list-item]
    return [], []
