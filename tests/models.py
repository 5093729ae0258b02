"""Tiny random models of every kind, built from configs: no download. Each is the same on every call."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from packaging.version import Version
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

VOCABULARY, HIDDEN, LAYERS = 96, 16, 2
NUM_EXPERTS = 4  # of mixtures
PAD, BOS, EOS, IMAGE = 0, 1, 2, 5
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that nothing is lost to rounding
    **_SPECIAL,
}
_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


needs_peft_for_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {hf.__version__} calls PEFT from version {MIN_PEFT_VERSION} on alone",
)

_HEADS: dict[str, Any] = {  # of models whose heads all have keys and values of their own
    name: value
    for name, value in _DECODER.items()
    if name not in ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings")
}


def _without_head_dim(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "head_dim"}


def _seeded(build: Callable[..., nn.Module]) -> Callable[..., Any]:
    @wraps(build)
    def seeded(**options: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build(**options).eval()

    return seeded


@_seeded
def tiny_llama(**options: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER | options))


@_seeded
def tiny_llama_classifier(**options: Any) -> nn.Module:
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**_DECODER | {"num_labels": 3} | options))


@_seeded
def tiny_qwen2(**options: Any) -> nn.Module:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER | options))


@_seeded
def tiny_qwen3(**options: Any) -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER | options))


@_seeded
def tiny_mistral(**options: Any) -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**_DECODER | {"sliding_window": 8} | options))


@_seeded
def tiny_phi(**options: Any) -> nn.Module:
    return hf.PhiForCausalLM(hf.PhiConfig(**_without_head_dim(_DECODER) | options))


@_seeded
def tiny_phi3(**options: Any) -> nn.Module:
    """Query, key and value in one projection, gate and up in another."""
    return hf.Phi3ForCausalLM(hf.Phi3Config(**_without_head_dim(_DECODER) | options))


@_seeded
def tiny_falcon(**options: Any) -> nn.Module:
    sizes = {"num_kv_heads": 1, "ffn_hidden_size": 24, "new_decoder_architecture": True}
    return hf.FalconForCausalLM(hf.FalconConfig(**_HEADS | sizes | options))


@_seeded
def tiny_bloom(**options: Any) -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(**_HEADS | options))


@_seeded
def tiny_gpt_neox(**options: Any) -> nn.Module:
    sizes = {"intermediate_size": 24, "max_position_embeddings": 128}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_HEADS | sizes | options))


@_seeded
def tiny_gemma(**options: Any) -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**_DECODER | options))


@_seeded
def tiny_gemma2(**options: Any) -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_DECODER | options))


@_seeded
def tiny_gemma3(**options: Any) -> nn.Module:
    """One layer with a sliding window, one without."""
    layers = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_DECODER | layers | options))


@_seeded
def tiny_gpt2(**options: Any) -> nn.Module:
    sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": 128, "vocab_size": VOCABULARY}
    config = hf.GPT2Config(**sizes | {"initializer_range": 0.2, "bos_token_id": BOS, "eos_token_id": EOS} | options)
    return hf.GPT2LMHeadModel(config)


@_seeded
def tiny_opt(**options: Any) -> nn.Module:
    sizes = {"ffn_dim": 24, "word_embed_proj_dim": HIDDEN, "init_std": 0.2}
    return hf.OPTForCausalLM(hf.OPTConfig(**_DECODER | sizes | options))


@_seeded
def tiny_mixtral(**options: Any) -> nn.Module:
    experts = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_DECODER | experts | options))


@_seeded
def tiny_qwen2_moe(**options: Any) -> nn.Module:
    experts = {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    }
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**_DECODER | experts | options))


@_seeded
def tiny_qwen3_moe(**options: Any) -> nn.Module:
    experts = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_DECODER | experts | options))


@_seeded
def tiny_olmoe(**options: Any) -> nn.Module:
    experts = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**_without_head_dim(_DECODER) | experts | options))


@_seeded
def tiny_deepseek_v3(**options: Any) -> nn.Module:
    """The first layer is dense, the others have routed and shared experts; routing by groups."""
    experts = {
        "first_k_dense_replace": 1,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 12,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 2,
    }
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_without_head_dim(_DECODER) | experts | options))


@_seeded
def tiny_gpt_oss(**options: Any) -> nn.Module:
    """Experts stored [experts, in, out], with biases, gate and up interleaved."""
    experts = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**_DECODER | experts | options))


@_seeded
def tiny_llama4(**options: Any) -> nn.Module:
    """The first layer is dense; the second has a shared expert, and experts that multiply every token."""
    experts = {"num_local_experts": NUM_EXPERTS, "moe_layers": [1], "intermediate_size_mlp": 20}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**_DECODER | experts | options))


@_seeded
def tiny_bert(**options: Any) -> nn.Module:
    config = hf.BertConfig(**_DECODER | {"bos_token_id": None, "eos_token_id": None, "num_labels": 3} | options)
    return hf.BertForSequenceClassification(config)


@_seeded
def tiny_bert_encoder(**options: Any) -> nn.Module:
    return hf.BertModel(hf.BertConfig(**_DECODER | options), add_pooling_layer=False)


@_seeded
def tiny_albert(**options: Any) -> nn.Module:
    """One set of layers, called twice in every forward pass."""
    return hf.AlbertForMaskedLM(hf.AlbertConfig(**_DECODER | {"embedding_size": 12} | options))


@_seeded
def tiny_t5(**options: Any) -> nn.Module:
    sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 24, "num_layers": LAYERS, "num_heads": 2, "vocab_size": VOCABULARY}
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes | special | options))


_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "init_std": 0.2,
    "decoder_start_token_id": EOS,
    **_SPECIAL,
}


@_seeded
def tiny_bart(**options: Any) -> nn.Module:
    return hf.BartForConditionalGeneration(hf.BartConfig(**_SEQ2SEQ | {"max_position_embeddings": 128} | options))


@_seeded
def tiny_whisper(**options: Any) -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**_SEQ2SEQ | sizes | options))


@_seeded
def tiny_vit(**options: Any) -> nn.Module:
    config = hf.ViTConfig(**_VISION | {"num_labels": 3, "initializer_range": 0.2} | options)
    return hf.ViTForImageClassification(config)


@_seeded
def tiny_llava(**options: Any) -> nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION, projection_dim=HIDDEN),
        text_config=hf.LlamaConfig(**_DECODER),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        **options,
    )
    return hf.LlavaForConditionalGeneration(config)


@_seeded
def tiny_llava_onevision(**options: Any) -> nn.Module:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_VISION),
        text_config=hf.Qwen2Config(**_DECODER),
        image_token_index=IMAGE,
        video_token_index=6,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8]],
        **options,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


@_seeded
def tiny_qwen2_5_vl(**options: Any) -> nn.Module:
    text = _DECODER | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 2, "hidden_size": HIDDEN, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = hf.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"patch_size": 4, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        **options,
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config)


@_seeded
def tiny_qwen3_vl(**options: Any) -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {"depth": 2, "hidden_size": HIDDEN, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = hf.Qwen3VLConfig(
        text_config=_DECODER | {"rope_parameters": rope},
        vision_config=vision | {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        **options,
    )
    return hf.Qwen3VLForConditionalGeneration(config)


@_seeded
def tiny_idefics3(**options: Any) -> nn.Module:
    config = hf.Idefics3Config(
        vision_config=_VISION, text_config=hf.LlamaConfig(**_DECODER), image_token_id=IMAGE, scale_factor=1, **options
    )
    return hf.Idefics3ForConditionalGeneration(config)


@_seeded
def tiny_smolvlm(**options: Any) -> nn.Module:
    config = hf.SmolVLMConfig(
        vision_config=_VISION, text_config=hf.LlamaConfig(**_DECODER), image_token_id=IMAGE, scale_factor=1, **options
    )
    return hf.SmolVLMForConditionalGeneration(config)


@_seeded
def tiny_paligemma(**options: Any) -> nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**_VISION, projection_dim=HIDDEN),
        text_config=hf.GemmaConfig(**_DECODER),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        **options,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


@_seeded
def tiny_mllama(**options: Any) -> nn.Module:
    """Between its two layers one that attends to the image, and is called only if there is one."""
    vision = {"attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0], "max_num_tiles": 1}
    layers = {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default"}}
    config = hf.MllamaConfig(
        vision_config=hf.MllamaVisionConfig(
            **_VISION | vision | {"vision_output_dim": 2 * HIDDEN, "supported_aspect_ratios": [[1, 1]]}
        ),
        text_config=hf.MllamaTextConfig(**_without_head_dim(_DECODER) | layers),
        image_token_index=IMAGE,
        **options,
    )
    model = hf.MllamaForConditionalGeneration(config)
    for layer in model.model.language_model.layers[1:2]:
        nn.init.ones_(layer.cross_attn_attn_gate)  # starts at zero: images unseen
    return model


@_seeded
def tiny_gemma3_multimodal(**options: Any) -> nn.Module:
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(**_DECODER | {"sliding_window": 8}),
        image_token_index=IMAGE,
        boi_token_index=7,
        eoi_token_index=8,
        mm_tokens_per_image=4,
        **options,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # starts at zero: images unseen
    return model


@_seeded
def tiny_internvl(**options: Any) -> nn.Module:
    vision = hf.InternVLVisionConfig(**_VISION | {"image_size": [8, 8], "patch_size": [4, 4]})
    config = hf.InternVLConfig(
        vision_config=vision,
        text_config=hf.Qwen2Config(**_DECODER),
        image_token_id=IMAGE,
        downsample_ratio=1.0,
        **options,
    )
    return hf.InternVLForConditionalGeneration(config)


class _NvilaConfig(hf.PretrainedConfig):
    model_type = "tiny_nvila"


class Nvila(hf.PreTrainedModel):
    """The shape of NVILA's remote code: a composite that splices image features into the text embeddings."""

    config_class = _NvilaConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: _NvilaConfig) -> None:
        super().__init__(config)
        self.llm = hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER))
        self.vision_tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(**_VISION))
        self.mm_projector = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        embeddings = self.llm.get_input_embeddings()(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if pixel_values is not None:
            image = self.mm_projector(self.vision_tower(pixel_values).last_hidden_state)
            embeddings = torch.cat([image, embeddings], dim=1)
            mask = torch.cat([mask.new_ones(image.shape[:2]), mask], dim=1)
        return self.llm(inputs_embeds=embeddings, attention_mask=mask, **kwargs)


@_seeded
def tiny_nvila() -> nn.Module:
    return Nvila(_NvilaConfig())


class _Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 12)
        self.down = nn.Linear(12, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class _RoutedLayer(nn.Module):
    """Experts as a list of modules, each called only with the tokens routed to it (as DeepSeek's own code)."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, num_experts)
        self.experts = nn.ModuleList(_Expert() for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, HIDDEN)
        best, choice = self.gate(tokens).softmax(-1).max(-1)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().view(-1)
            if rows.numel():
                output = output.index_add(0, rows, expert(tokens[rows]) * best[rows, None])
        return x + output.view_as(x)


class Routed(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_RoutedLayer(num_experts) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@_seeded
def tiny_routed(num_experts: int = 4) -> nn.Module:
    return Routed(num_experts)


@_seeded
def tiny_mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


CAUSAL = [tiny_llama, tiny_gpt2, tiny_opt, tiny_qwen2, tiny_gemma2, tiny_mixtral, tiny_qwen2_moe]
MULTIMODAL = [tiny_llava, tiny_qwen2_5_vl, tiny_idefics3, tiny_paligemma, tiny_internvl, tiny_nvila]
SEQ2SEQ = [tiny_t5, tiny_bart, tiny_whisper]
ENCODERS = [tiny_bert, tiny_bert_encoder, tiny_albert, tiny_llama_classifier, tiny_vit]
