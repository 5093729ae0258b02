"""A Hugging Face cache of tiny random models under the ids that PEFT's tests load.

``from_pretrained("org/name")`` looks for ``models--org--name/refs/main`` below ``HF_HUB_CACHE``, reads a commit
hash from it and opens ``models--org--name/snapshots/<hash>/``. Those folders are written here from
configurations alone, so that the tests run offline and unchanged.

The models keep the shapes that the tests rely on (two decoder layers, twelve for ``opt-125m``, tied or untied
heads, T5 without biases) and are otherwise as small as they can be. Weights are drawn with a standard deviation
of 0.1 rather than the usual 0.02: at these widths 0.02 makes logits so flat that "the adapter changed the
output" cannot be told from rounding.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from .rows import MagnitudeDowserConfig

REVISION = "0" * 40
VOCAB_SIZE = 128
INIT_STD = 0.1

_WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_WIDTHS, "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 2}
_ENCODER = {**_WIDTHS, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64}
_OPT = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
    "init_std": INIT_STD,
}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": VOCAB_SIZE - 1,
    "eos_token_id": VOCAB_SIZE - 1,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.5,
}
_BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "init_std": INIT_STD,
}
_WHISPER = {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
_DEBERTA = {**_ENCODER, "relative_attention": True, "position_biased_input": False, "type_vocab_size": 0}

# (ids, transformers' auto class, model type, configuration)
MODELS: list[tuple[tuple[str, ...], str, str, dict[str, Any]]] = [
    (("peft-internal-testing/tiny-random-OPTForCausalLM",), "ForCausalLM", "opt", {**_OPT, "num_hidden_layers": 2}),
    (("peft-internal-testing/opt-125m",), "ForCausalLM", "opt", {**_OPT, "num_hidden_layers": 12}),
    (
        ("gpt2", "peft-internal-testing/tiny-random-GPT2LMHeadModel", "hf-internal-testing/tiny-random-gpt2"),
        "ForCausalLM",
        "gpt2",
        _GPT2,
    ),
    (
        ("peft-internal-testing/tiny-random-GPTJForCausalLM",),
        "ForCausalLM",
        "gptj",
        {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False},
    ),
    (
        ("trl-internal-testing/tiny-random-LlamaForCausalLM", "peft-internal-testing/tiny-random-LlamaForCausalLM"),
        "ForCausalLM",
        "llama",
        _DECODER,
    ),
    (("peft-internal-testing/tiny-dummy-qwen2",), "ForCausalLM", "qwen2", _DECODER),
    (("peft-internal-testing/tiny-random-GPTNeoXForCausalLM",), "ForCausalLM", "gpt_neox", _DECODER),
    (("Qwen/Qwen2-0.5B",), "ForCausalLM", "qwen2", {**_DECODER, "vocab_size": VOCAB_SIZE + 32}),  # spare embeddings
    (("hf-internal-testing/tiny-random-MistralForCausalLM",), "ForCausalLM", "mistral", _DECODER),
    (
        ("hf-internal-testing/tiny-random-Gemma3ForCausalLM",),
        "ForCausalLM",
        "gemma3_text",
        {**_DECODER, "head_dim": 8, "sliding_window": 16, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
    ),
    (
        ("trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",),
        "ForSequenceClassification",
        "llama",
        {**_DECODER, "num_labels": 1, "pad_token_id": 1},
    ),
    (
        (
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "peft-internal-testing/tiny-random-t5",
        ),
        "ForSeq2SeqLM",
        "t5",
        _T5,
    ),
    (("peft-internal-testing/tiny-random-BartForConditionalGeneration",), "ForSeq2SeqLM", "bart", _BART),
    (("openai/whisper-tiny",), "ForSpeechSeq2Seq", "whisper", _WHISPER),
    (("bert-base-uncased", "peft-internal-testing/tiny-random-BertModel"), "", "bert", _ENCODER),
    (("peft-internal-testing/tiny-random-RobertaModel",), "", "roberta", _ENCODER),
    (("peft-internal-testing/tiny-random-DebertaModel",), "", "deberta", {**_DEBERTA, "pos_att_type": "c2p|p2c"}),
    (("peft-internal-testing/tiny-random-DebertaV2Model",), "", "deberta-v2", {**_DEBERTA, "pos_att_type": "c2p|p2c"}),
    (
        ("peft-internal-testing/tiny-random-BertForSequenceClassification",),
        "ForSequenceClassification",
        "bert",
        _ENCODER,
    ),
    (
        ("peft-internal-testing/tiny-random-RobertaForSequenceClassification",),
        "ForSequenceClassification",
        "roberta",
        _ENCODER,
    ),
]

# The adapters that test_auto loads; PEFT stores LoRA under these ids, we store the method under test.
# (id, base id, transformers' auto class, task type)
ADAPTERS: list[tuple[str, str, str, str | None]] = [
    ("tiny-OPTForCausalLM-lora", "tiny-random-OPTForCausalLM", "ForCausalLM", "CAUSAL_LM"),
    ("tiny_T5ForSeq2SeqLM-lora", "tiny-random-T5ForConditionalGeneration-calibrated", "ForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    ("tiny_OPTForSequenceClassification-lora", "tiny-random-OPTForCausalLM", "ForSequenceClassification", "SEQ_CLS"),
    ("tiny_GPT2ForTokenClassification-lora", "tiny-random-GPT2LMHeadModel", "ForTokenClassification", "TOKEN_CLS"),
    ("tiny_OPTForQuestionAnswering-lora", "tiny-random-OPTForCausalLM", "ForQuestionAnswering", "QUESTION_ANS"),
    ("tiny_OPTForFeatureExtraction-lora", "tiny-random-OPTForCausalLM", "", "FEATURE_EXTRACTION"),
    ("tiny_WhisperForConditionalGeneration-lora", "openai/whisper-tiny", "ForSpeechSeq2Seq", None),
    ("gpt2-lora-random", "tiny-random-GPT2LMHeadModel", "ForCausalLM", "CAUSAL_LM"),
]


def build_cache(cache: Path, stand_in: Callable[..., Any]) -> None:
    """Write every model and adapter below ``cache``, which ``HF_HUB_CACHE`` must already name.

    Args:
        cache: folder to fill.
        stand_in: makes the configuration of the method under test, from ``task_type`` and ``target_modules``.
    """
    for ids, auto_class, model_type, settings in MODELS:
        for repo in ids:
            model = _random_model(auto_class, model_type, settings)
            model.save_pretrained(_snapshot(cache, repo))
            _tokenizer().save_pretrained(_snapshot(cache, repo))
    for name, base, auto_class, task_type in ADAPTERS:
        folder = _snapshot(cache, f"peft-internal-testing/{name}")
        try:
            _save_adapter(folder, base, auto_class, task_type, stand_in)
        except Exception:  # a fault of the method under test: let the tests that load this adapter report it
            traceback.print_exc()
    _save_lora_config(_snapshot(cache, "peft-internal-testing/tiny-opt-lora-revision", revision="test"))


def _snapshot(cache: Path, repo: str, revision: str = "main") -> Path:
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(REVISION)
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def _random_model(auto_class: str, model_type: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{"initializer_range": INIT_STD, **settings})
    return getattr(transformers, f"AutoModel{auto_class}").from_config(config)


def _words() -> Iterator[str]:
    yield from ("<s>", "<pad>", "</s>", "<unk>", "hello", "world")
    yield from (f"w{i}" for i in range(6, VOCAB_SIZE))


def _tokenizer() -> Any:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_words())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def _load(base: str, auto_class: str) -> Any:
    repo = base if "/" in base else f"peft-internal-testing/{base}"
    return getattr(transformers, f"AutoModel{auto_class}").from_pretrained(repo)


def _save_adapter(
    folder: Path, base: str, auto_class: str, task_type: str | None, stand_in: Callable[..., Any]
) -> None:
    targets = None if task_type else ["q_proj", "v_proj"]  # without a task type PEFT records the model's class
    config = stand_in(task_type=task_type, target_modules=targets)
    peft.get_peft_model(_load(base, auto_class), config).save_pretrained(folder)


def _save_lora_config(folder: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="peft-internal-testing/opt-125m")
    config.save_pretrained(folder)


def main() -> None:
    stand_in = peft.LoraConfig if "--baseline" in sys.argv[1:] else MagnitudeDowserConfig
    build_cache(Path(os.environ["HF_HUB_CACHE"]), stand_in)


if __name__ == "__main__":
    main()
