"""The miniature LLaVA: the real architecture, three million parameters.

A CLIP vision tower reads a 32x32 image as 16 patches, a two-layer projector carries them into the
token space, and a Llama decoder answers. The classes are the ones of transformers, so whatever
works here (PEFT target modules, hooks, generation, saving) works on the large models. Only the
tokenizer is unusual: one token per word of the closed vocabulary.
"""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dowser_peft.miniature.drawing import IMAGE_SIZE
from dowser_peft.miniature.tasks import vocabulary

PATCH_SIZE = 8
HIDDEN_SIZE, HEAD_SIZE = 160, 32
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<bos>", "<eos>", "<unk>", "<image>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the tasks' vocabulary; it puts BOS before every text."""
    words = [PAD, BOS, EOS, UNKNOWN, IMAGE, *vocabulary()]
    ids = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = HIDDEN_SIZE, intermediate_size: int = 432, layers: int = 8
) -> LlavaForConditionalGeneration:
    """A freshly initialised model; seed torch first to make it reproducible.

    Args:
        tokenizer: of :func:`build_tokenizer`.
        hidden_size, intermediate_size, layers: of the decoder, whose attention heads are 32 wide; the vision tower
            is always the same.
    """
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_key_value_heads=hidden_size // HEAD_SIZE,
        max_position_embeddings=256,
        # 0.02 is made for widths in the thousands; at width 160 it starves the first layers.
        initializer_range=0.05 * (HIDDEN_SIZE / hidden_size) ** 0.5,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        image_seq_length=IMAGE_TOKENS,
        # The last layer: with three of them there is none to throw away.
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    for name, token_id in special.items():
        setattr(model.generation_config, name, token_id)
    return model
