"""Synthetic inputs: lengths, first tokens, which tokens may appear, and whose settings count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

from dowser_peft.probing.prompts import NonFiniteLogitsError, Sampling, synthetic_inputs
from tests import models

TEXT = [
    models.tiny_llama,
    models.tiny_gpt2,
    models.tiny_opt,
    models.tiny_gemma2,
    models.tiny_llava,
    models.tiny_qwen2_5_vl,
    models.tiny_bart,
    models.tiny_t5,
    models.tiny_bert,
    models.tiny_llama_classifier,
]


def inputs_of(model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"num_prompts": 6, "prompt_length": 8, "sampling": Sampling()}
    return synthetic_inputs(model, **defaults | options)  # type: ignore[arg-type]


def tokenizer_of(size: int, special: dict[str, str]) -> hf.PreTrainedTokenizerFast:
    words = {f"word{index}": index for index in range(size)}
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")), **special)


@pytest.mark.parametrize("length", [1, 2, 3, 64])
@pytest.mark.parametrize("build", TEXT)
def test_every_prompt_has_the_length_asked_for(build: Callable[[], nn.Module], length: int) -> None:
    found = inputs_of(build(), num_prompts=7, prompt_length=length)
    assert all(value.shape == (7, length) for value in found.values())
    if length == 64:
        assert len(found["input_ids"].unique(dim=0)) == 7


@pytest.mark.parametrize(
    "build", [models.tiny_llama, models.tiny_gpt2, models.tiny_llava, models.tiny_llama_classifier]
)
def test_prompts_begin_with_bos(build: Callable[[], nn.Module]) -> None:
    ids = inputs_of(build())["input_ids"]
    assert ids[:, 0].tolist() == [models.BOS] * 6
    assert not bool((ids[:, 1:] == models.BOS).any())


def test_prompts_of_a_model_without_bos() -> None:
    model = models.tiny_llama(bos_token_id=None)
    model.generation_config.bos_token_id = None
    ids = inputs_of(model, num_prompts=40)["input_ids"]
    assert len(ids[:, 0].unique()) > 5


def test_a_bos_outside_the_vocabulary_is_none() -> None:
    model = models.tiny_llama()
    model.config.bos_token_id = model.generation_config.bos_token_id = 10_000
    assert int(inputs_of(model)["input_ids"].max()) < models.VOCABULARY


def test_the_decoder_begins_with_its_start_token() -> None:
    for build in (models.tiny_t5, models.tiny_bart):
        model = build()
        for length in (1, 5):
            target = inputs_of(model, prompt_length=length)["decoder_input_ids"]
            assert target[:, 0].tolist() == [model.config.decoder_start_token_id] * 6
    target = inputs_of(models.tiny_whisper(), prompt_length=5)["decoder_input_ids"]
    assert target[:, 0].tolist() == [models.EOS] * 6


@pytest.mark.parametrize("build", TEXT)
def test_special_tokens_never_appear(build: Callable[[], nn.Module]) -> None:
    """Neither in the random part nor in what the model writes; a model that loves them must not get its way."""
    model = build()
    special = {
        models.tiny_t5: {models.PAD, models.EOS},
        models.tiny_gpt2: {models.BOS, models.EOS},
        models.tiny_bert: {models.PAD},
        models.tiny_llava: {models.PAD, models.BOS, models.EOS, models.IMAGE},
        models.tiny_qwen2_5_vl: {models.PAD, models.BOS, models.EOS, models.IMAGE, 6, 7, 8},
    }.get(build, {models.PAD, models.BOS, models.EOS})
    head = model.get_output_embeddings() if model.can_generate() else None
    if head is not None and getattr(head, "bias", None) is None and build is not models.tiny_gemma2:
        head.bias = nn.Parameter(torch.zeros(head.out_features))
        head.bias.data[[models.PAD, models.BOS, models.EOS, models.IMAGE]] = 50.0
    for name, ids in inputs_of(model, num_prompts=50, prompt_length=12).items():
        assert not special & set(ids[:, 1:].unique().tolist()), name


def test_lists_of_special_tokens_are_read() -> None:
    model = models.tiny_llama(eos_token_id=[2, 3, 4])
    model.config.begin_of_image_token_id = 10
    model.config.media_token_ids = [11, 12]
    ids = inputs_of(model, num_prompts=100, prompt_length=12)["input_ids"]
    assert not {2, 3, 4, 10, 11, 12} & set(ids.unique().tolist())


def test_a_tokenizer_tells_what_is_special_and_where_the_vocabulary_ends() -> None:
    special = {
        "bos_token": "word1",
        "eos_token": "word2",
        "pad_token": "word0",
        "additional_special_tokens": ["word7"],
    }
    tokenizer = tokenizer_of(20, special)
    ids = inputs_of(models.tiny_llama(), num_prompts=100, prompt_length=12, tokenizer=tokenizer)["input_ids"]
    assert set(ids.unique().tolist()) <= set(range(20)) - {0, 2, 7}
    bert = inputs_of(models.tiny_bert(), tokenizer=tokenizer_of(20, {"cls_token": "word4", "pad_token": "word0"}))
    assert bert["input_ids"][:, 0].tolist() == [4] * 6


def test_a_vocabulary_of_special_tokens_only_is_refused() -> None:
    tokenizer = tokenizer_of(2, {"bos_token": "word0", "eos_token": "word1"})
    with pytest.raises(ValueError, match="special tokens"):
        inputs_of(models.tiny_llama(), tokenizer=tokenizer)


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_bart])
def test_the_models_own_generation_settings_do_not_count(build: Callable[[], nn.Module]) -> None:
    plain, odd = build(), build()
    odd.generation_config.update(
        num_beams=4,
        num_return_sequences=2,
        min_new_tokens=50,
        max_length=3,
        do_sample=False,
        temperature=0.1,
        top_k=1,
        no_repeat_ngram_size=1,
        forced_eos_token_id=2,
        suppress_tokens=list(range(10, 40)),
        return_dict_in_generate=True,
        use_cache=False,
    )
    config, before = odd.generation_config, str(odd.generation_config.to_dict())
    found, expected = inputs_of(odd), inputs_of(plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert odd.generation_config is config
    assert str(config.to_dict()) == before


def test_sampling_settings_count() -> None:
    model = models.tiny_llama()
    expected = inputs_of(model, prompt_length=20)["input_ids"]
    for sampling in (Sampling(temperature=5.0), Sampling(top_p=0.1), Sampling(repetition_penalty=3.0)):
        assert not torch.equal(inputs_of(model, prompt_length=20, sampling=sampling)["input_ids"], expected)


def test_prompts_are_really_written_by_the_model() -> None:
    """The continuation of a prompt, cut to what the model saw, is what greedy decoding writes at temperature 0."""
    model, cold = models.tiny_llama(), Sampling(temperature=1e-4, top_p=1.0, repetition_penalty=1.0)
    ids = inputs_of(model, prompt_length=16, sampling=cold)["input_ids"]
    start = ids[:, :6]  # BOS and at most five random tokens
    with torch.no_grad():
        for _ in range(10):
            logits = model(start).logits[:, -1]
            logits[:, [models.PAD, models.BOS, models.EOS]] = -torch.inf
            start = torch.cat([start, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(start, ids)


def test_images_and_sounds_are_noise() -> None:
    assert inputs_of(models.tiny_vit())["pixel_values"].shape == (6, 3, 8, 8)
    assert inputs_of(models.tiny_vit().bfloat16())["pixel_values"].dtype == torch.bfloat16
    assert inputs_of(models.tiny_whisper())["input_features"].shape == (6, 8, 24)


def test_an_image_captioner_gets_noise_and_random_text() -> None:
    torch.manual_seed(0)
    decoder = hf.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, bos_token_id=1, add_cross_attention=True
    )
    model = hf.VisionEncoderDecoderModel(encoder=models.tiny_vit().vit, decoder=hf.GPT2LMHeadModel(decoder))
    found = inputs_of(model)
    assert found["pixel_values"].shape == (6, 3, 8, 8)
    assert found["decoder_input_ids"].shape == (6, 8)


def test_a_kind_of_model_without_synthetic_inputs_is_told_apart() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (2,), "num_feat_extract_layers": 1}
    config = hf.Wav2Vec2Config(
        **sizes, **convolutions, feat_extract_norm="layer", num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    with pytest.raises(ValueError, match=r"Wav2Vec2Model takes 'input_values'.*batches="):
        inputs_of(hf.Wav2Vec2Model(config))


def test_a_model_that_cannot_write_says_so_before_it_samples() -> None:
    """Sampling from NaN on a GPU would be a device-side assert, after which the process is of no use."""
    model = models.tiny_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLogitsError):
        inputs_of(model)
