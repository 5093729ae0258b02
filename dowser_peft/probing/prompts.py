"""Synthetic inputs: what a model is probed with when there is no data.

A model that generates text writes its own prompts: BOS and one to five random ordinary tokens, continued by
the model itself (paper: temperature 0.9, top-p 0.9, repetition penalty 1.05). Special tokens, the end of
text and image placeholders among them, are never sampled, so that every prompt has exactly the length asked
for and batches need no padding. An encoder gets random tokens, a vision or speech model gets noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_MAX_SEED_TOKENS = 5
_GENERATION_BATCH = 64  # fixed, so that the prompts do not depend on the batch size of the probe


@dataclass(frozen=True)
class Sampling:
    """How prompts are sampled; the defaults are the paper's."""

    temperature: float = 0.9
    top_p: float = 0.9
    repetition_penalty: float = 1.05


def synthetic_inputs(
    model: PreTrainedModel,
    *,
    num_prompts: int,
    prompt_length: int,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, torch.Tensor]:
    """Inputs of ``model.forward`` for ``num_prompts`` prompts, first dimension N; uses the global RNG.

    Raises:
        ValueError: if the model's kind of input is not known.
    """
    config, name = model.config, model.main_input_name
    device = input_device(model)
    if name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        shape = (num_prompts, getattr(config, "num_channels", 3), height, width)
        return {name: torch.randn(shape, device=device, dtype=model.dtype)}
    if name == "input_features" and config.is_encoder_decoder:
        shape = (num_prompts, config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(shape, device=device, dtype=model.dtype)
        vocabulary = _ordinary_tokens(model, tokenizer)
        return {name: features, "decoder_input_ids": _random_tokens(vocabulary, (num_prompts, prompt_length), device)}
    if name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes {name!r}, for which there are no synthetic inputs. Probe it with "
            "data, probe(model, batches=...), and pass importance=statistics; or use importance='magnitude'"
        )

    vocabulary = _ordinary_tokens(model, tokenizer)
    if not model.can_generate():
        return {name: _random_tokens(vocabulary, (num_prompts, prompt_length), device)}
    with _generation_config(model, vocabulary, sampling):
        chunks = [
            _self_written(model, vocabulary, min(_GENERATION_BATCH, num_prompts - start), prompt_length, device)
            for start in range(0, num_prompts, _GENERATION_BATCH)
        ]
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


def input_device(model: PreTrainedModel) -> torch.device:
    """Where the inputs belong: with the first weights, or where accelerate runs them if they are offloaded."""
    if model.device.type != "meta":
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    found = next((d for hook in hooks if (d := getattr(hook, "execution_device", None)) is not None), "cpu")
    return torch.device(found)


def _self_written(
    model: PreTrainedModel, vocabulary: torch.Tensor, num_prompts: int, length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Prompts continued by the model itself: ``input_ids`` ``[N, length]``."""
    if model.config.is_encoder_decoder:
        source = _random_tokens(vocabulary, (num_prompts, length), device)
        written = model.generate(source, attention_mask=torch.ones_like(source), max_length=length)
        return {"input_ids": source, "decoder_input_ids": written[:, :length]}

    bos = _token_id(model, "bos_token_id")
    num_bos = 0 if bos is None else 1
    num_random = torch.randint(1, _MAX_SEED_TOKENS + 1, (num_prompts,))
    seed_lengths = (num_random + num_bos).clamp(max=length)
    width = int(seed_lengths.max())
    seeds = _random_tokens(vocabulary, (num_prompts, width), device)
    attention_mask = torch.zeros_like(seeds)
    for row, seed_length in enumerate(seed_lengths.tolist()):
        attention_mask[row, width - seed_length :] = 1  # padded on the left, for generation
        if bos is not None:
            seeds[row, width - seed_length] = bos
    num_new = length - int(seed_lengths.min())
    if num_new > 0:
        written = model.generate(seeds, attention_mask=attention_mask, max_new_tokens=num_new)
    else:
        written = seeds
    starts = width - seed_lengths
    rows = [written[row, start : start + length] for row, start in enumerate(starts.tolist())]
    return {"input_ids": torch.stack(rows)}


@contextmanager
def _generation_config(model: PreTrainedModel, vocabulary: torch.Tensor, sampling: Sampling) -> Iterator[None]:
    """Let ``model.generate`` sample plainly, whatever the model's own generation config asks for."""
    vocab_size = _vocab_size(model)
    banned = torch.ones(vocab_size, dtype=torch.bool)
    banned[vocabulary.cpu()] = False
    original = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
        repetition_penalty=sampling.repetition_penalty,
        suppress_tokens=banned.nonzero().view(-1).tolist() or None,
        pad_token_id=int(vocabulary[0]),  # masked out; any id does
        decoder_start_token_id=_token_id(model, "decoder_start_token_id"),
        bos_token_id=_token_id(model, "bos_token_id"),
    )
    try:
        yield
    finally:
        model.generation_config = original


def _ordinary_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Ids of the tokens that are not special ``[n]``, from the tokenizer if given and the model's configs."""
    special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
    special |= _special_ids(model.config.to_dict())
    if getattr(model, "generation_config", None) is not None:
        special |= _special_ids(model.generation_config.to_dict())
    vocab_size = _vocab_size(model)
    if tokenizer is not None:
        vocab_size = min(vocab_size, len(tokenizer))  # embeddings are often padded past the vocabulary
    ordinary = torch.tensor([token for token in range(vocab_size) if token not in special])
    if ordinary.numel() == 0:
        raise ValueError(f"all {vocab_size} tokens of {type(model).__name__} are special tokens")
    return ordinary


def _special_ids(config: dict[str, Any]) -> set[int]:
    """Every id named ``*_token_id`` or ``*_token_index`` in a config, nested ones included."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(key).endswith(("_token_id", "_token_index")) and value is not None:
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return found


def _token_id(model: PreTrainedModel, name: str) -> int | None:
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value[0] if isinstance(value, (list, tuple)) else value
    return None


def _vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _random_tokens(vocabulary: torch.Tensor, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return vocabulary[torch.randint(len(vocabulary), shape)].to(device)
