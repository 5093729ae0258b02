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
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from dowser_peft.probing.forward import input_device

_MAX_SEED_TOKENS = 5
GENERATION_BATCH = 64  # fixed, so that the prompts do not depend on the batch size of the probe


@dataclass(frozen=True)
class Sampling:
    """How prompts are sampled; the defaults are the paper's."""

    temperature: float = 0.9
    top_p: float = 0.9
    repetition_penalty: float = 1.05


class NonFiniteLogitsError(Exception):
    """The model cannot write: its logits hold NaN or inf."""


class _WatchNonFinite(LogitsProcessor):
    """Notes NaN and inf without waiting for the device, and hides them from sampling, which on a GPU would end in a
    device-side assert that ruins the process.
    """

    def __init__(self) -> None:
        self.found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bad = (torch.isnan(scores) | torch.isposinf(scores)).any(-1) | torch.isneginf(scores).all(-1)  # [N]
        self.found = bad.any() if self.found is None else self.found | bad.any()
        return scores.masked_fill(bad[:, None], 0.0)


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
        NonFiniteLogitsError: if the model writes its own prompts and its logits hold NaN or inf.
    """
    name, device = model.main_input_name, input_device(model)
    if name in ("pixel_values", "input_features"):
        noise = torch.randn((num_prompts, *_noise_shape(model)), device=device, dtype=model.dtype)
        if not model.config.is_encoder_decoder:
            return {name: noise}
        vocabulary = _ordinary_tokens(model, tokenizer)
        start = _token_id(model, "decoder_start_token_id")
        target = _random_tokens(vocabulary, num_prompts, prompt_length, start, device)
        return {name: noise, "decoder_input_ids": target}
    if name != "input_ids":
        raise _no_synthetic_inputs(model)

    vocabulary = _ordinary_tokens(model, tokenizer)
    first = first_token(model, tokenizer)
    if not model.can_generate():
        return {name: _random_tokens(vocabulary, num_prompts, prompt_length, first, device)}
    chunks: list[dict[str, torch.Tensor]] = []
    with _generation_config(model, vocabulary, sampling):
        for start in range(0, num_prompts, GENERATION_BATCH):
            size = min(GENERATION_BATCH, num_prompts - start)
            if model.config.is_encoder_decoder:
                source = _random_tokens(vocabulary, size, prompt_length, first, device)
                chunks.append({"input_ids": source, "decoder_input_ids": _written_from(model, source)})
            else:
                chunks.append({"input_ids": _self_written(model, vocabulary, size, prompt_length, first, device)})
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


@contextmanager
def without_pad_token(model: torch.nn.Module, *, enabled: bool) -> Iterator[None]:
    """Let a classifier that has no padding token take batches of prompts that need none.

    It finds the last token of each prompt by looking for padding, and refuses batches if it does not know what
    that is; no token has the id -1.
    """
    config: Any = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    enabled = enabled and getattr(config, "pad_token_id", -1) is None
    try:
        if enabled:
            config.pad_token_id = -1
        yield
    finally:
        if enabled:
            config.pad_token_id = None


def _noise_shape(model: PreTrainedModel) -> tuple[int, ...]:
    """Shape of one image or one utterance."""
    config: Any = model.config
    if model.main_input_name == "input_features" and hasattr(config, "num_mel_bins"):
        return config.num_mel_bins, 2 * config.max_source_positions
    config = next((part for part in (config, getattr(config, "encoder", None)) if hasattr(part, "image_size")), None)
    if model.main_input_name != "pixel_values" or config is None:
        raise _no_synthetic_inputs(model)
    size = config.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return getattr(config, "num_channels", 3), height, width


def _no_synthetic_inputs(model: PreTrainedModel) -> ValueError:
    return ValueError(
        f"{type(model).__name__} takes {model.main_input_name!r}, for which there are no synthetic inputs. Probe it "
        "with data, probe(model, batches=...), and pass importance=statistics; or use importance='magnitude'"
    )


def _written_from(model: PreTrainedModel, source: torch.Tensor) -> torch.Tensor:
    """What an encoder-decoder writes for ``source``, as long as ``source``, its start token included."""
    num_new = source.shape[1] - 1
    if num_new > 0:
        return _generate(model, source, torch.ones_like(source), num_new)
    start = _token_id(model, "decoder_start_token_id")
    return torch.full_like(source, 0 if start is None else start)


def _self_written(
    model: PreTrainedModel,
    vocabulary: torch.Tensor,
    num_prompts: int,
    length: int,
    first: int | None,
    device: torch.device,
) -> torch.Tensor:
    """Prompts continued by the model itself ``[N, length]``."""
    num_random = torch.randint(1, _MAX_SEED_TOKENS + 1, (num_prompts,))
    seed_lengths = (num_random + (first is not None)).clamp(max=length)
    width = int(seed_lengths.max())
    starts = (width - seed_lengths).tolist()  # padded on the left, for generation
    seeds = _random_tokens(vocabulary, num_prompts, width, None, device)
    attention_mask = torch.ones_like(seeds)
    for row, start in enumerate(starts):
        attention_mask[row, :start] = 0
        if first is not None:
            seeds[row, start] = first
    num_new = length - int(seed_lengths.min())
    written = _generate(model, seeds, attention_mask, num_new) if num_new > 0 else seeds
    return torch.stack([written[row, start : start + length] for row, start in enumerate(starts)])


def _generate(
    model: PreTrainedModel, tokens: torch.Tensor, attention_mask: torch.Tensor, num_new: int
) -> torch.Tensor:
    generate: Any = model.generate
    watch = _WatchNonFinite()
    written = generate(tokens, attention_mask=attention_mask, max_new_tokens=num_new, logits_processor=[watch])
    if watch.found is not None and bool(watch.found):
        raise NonFiniteLogitsError
    return written


@contextmanager
def _generation_config(model: PreTrainedModel, vocabulary: torch.Tensor, sampling: Sampling) -> Iterator[None]:
    """Let ``model.generate`` sample plainly, whatever the model's own generation config asks for."""
    vocab_size = _vocab_size(model)
    banned = torch.ones(vocab_size, dtype=torch.bool)
    banned[vocabulary.cpu()] = False
    original = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True,
        use_cache=True,  # whatever a training script has set: without it, prompts cost several times the probe
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
        elif str(key).endswith(("_token_id", "_token_index", "_token_ids")) and value is not None:
            found |= set(value) if isinstance(value, list | tuple) else {value}
    return found


def first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The token that begins every text: BOS, or what a BERT's tokenizer puts in its place."""
    first = _token_id(model, "bos_token_id")
    if first is None and tokenizer is not None:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    return first


def _token_id(model: PreTrainedModel, name: str) -> int | None:
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):
            value = next(iter(value), None)
        if value is not None and 0 <= value < _vocab_size(model):
            return value
    return None


def _vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _random_tokens(
    vocabulary: torch.Tensor, num_prompts: int, length: int, first: int | None, device: torch.device
) -> torch.Tensor:
    """Random ordinary tokens ``[N, length]``, after the token ``first`` if there is one."""
    tokens = vocabulary[torch.randint(len(vocabulary), (num_prompts, length))]
    if first is not None:
        tokens[:, 0] = first
    return tokens.to(device)
