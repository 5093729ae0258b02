"""Which linear layers an adapter targets when the user does not say.

The paper fine-tunes the attention and MLP projections of the language decoder; the vision tower, the
projector, the embeddings and the output head stay frozen. Here that is found from structure alone: the
numbered layers of the language model and the linear layers inside them. It works for causal language models,
for multimodal ones whatever they call their parts, and for encoders.

The cross-attention to an image that some decoders call only when there is one (Mllama, Idefics, BLIP) stays frozen
too: no text reaches it. So does what selects: the routers of mixtures of experts, the indexers of sparse attention.
Experts are targets: as linear layers, or as the parameters in which transformers 5 fuses those of its own models
(``default_parameters``). Fused in another way they stay frozen, and a warning says so.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from dowser_peft.base_layer import FLOAT_DTYPES, is_linear
from dowser_peft.fused_experts import fused_weights, unwrapped_name

_LANGUAGE_NAMES = ("language_model", "llm", "text_model", "text_decoder")
_OTHER_MODALITY = re.compile(
    r"vision|visual|image|audio|speech|codec|video|protein|projector|connector|perceiver|q_?former", re.I
)
_SELECTS = re.compile(r"(^|[._])(gate|router)$|(^|\.)(router|indexer)\.")  # `mlp.gate`; not `gate_proj`
_SELF_ATTENTION = re.compile(r"^(self_?)?att(entio)?n$", re.I)
_CROSS_ATTENTION = re.compile(r"^cross_?att(entio)?n$", re.I)
_LAYER_INDEX = re.compile(r"^(?P<stack>.*?)\.?(?<![^.])(?P<index>\d+)\.")


def default_targets(model: nn.Module) -> list[str]:
    """Names of the layers an adapter targets by default, in the order of the model's modules.

    Raises:
        ValueError: if the model has no numbered layers with linear layers inside.
    """
    prefix, root = language_model(model)
    unreached = () if _is_encoder_decoder(model) else tuple(_cross_attention(root))
    inside_layers = [
        name
        for name, module in _unwrapped_modules(root)
        if _LAYER_INDEX.match(name) and is_linear(module)
        if not _SELECTS.search(name) and not name.startswith(unreached)
    ]
    # A model without language (a vision encoder) has nothing left after this: then all its layers are meant.
    language = [name for name in inside_layers if not _OTHER_MODALITY.search(name)]
    names = [prefix + name for name in language or inside_layers]
    if not names:
        linear = [name for name, module in model.named_modules() if is_linear(module)]
        raise ValueError(
            f"target_modules is not set and {type(model).__name__} has no numbered layers with linear layers "
            f"inside to choose by default. Please specify `target_modules`, e.g. 'all-linear' or {linear[:4]}"
        )
    return names


def default_parameters(model: nn.Module) -> list[str]:
    """Names of the fused parameters of experts that an adapter targets by default, in the order of the model.

    Those of the numbered layers of the language decoder, as of linear layers.
    """
    prefix, _ = language_model(model)
    names = [
        name
        for name, weight in fused_weights(model)
        if name.startswith(prefix) and _LAYER_INDEX.match(name.removeprefix(prefix))
        if weight.parameter.dtype in FLOAT_DTYPES and not weight.is_offloaded()
    ]
    return [name for name in names if not _OTHER_MODALITY.search(name.removeprefix(prefix))]


def warn_about_frozen_experts(model: nn.Module, adapted: list[str], why: str) -> None:
    """Warn if the language decoder has fused experts that are not ``adapted``."""
    prefix, root = language_model(model)
    fused = (
        prefix + unwrapped_name(name)
        for name, weight in root.named_parameters()
        if weight.ndim == 3 and "experts" in name
    )
    frozen = next((name for name in fused if name not in adapted), None)
    if frozen is not None:
        warnings.warn(
            f"the experts of {type(model).__name__} ({frozen} and others) stay frozen: {why}",
            stacklevel=3,
        )


def last_layers(model: nn.Module, names: list[str], num_last_layers: int) -> list[str]:
    """Those of ``names`` that lie in the last ``num_last_layers`` layers of the language decoder.

    They are names of linear layers and of fused parameters.

    Raises:
        ValueError: if the decoder has fewer layers, or no target lies in them.
    """
    prefix, root = language_model(model)
    transformer = find_transformer(root)
    if transformer is not None and _is_encoder_decoder(root):
        prefix = _name_of(model, transformer.get_decoder())
    layer_of = {}
    for name in [*names, *(name for name, module in model.named_modules() if is_linear(module))]:
        match = _LAYER_INDEX.match(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match and not _OTHER_MODALITY.search(match["stack"]):
            layer_of[name] = int(match["index"])
    depth = max(layer_of.values(), default=-1) + 1
    if num_last_layers > depth:
        raise ValueError(f"num_last_layers={num_last_layers}, but the decoder has {depth} layers")
    kept = [name for name in names if layer_of.get(name, -1) >= depth - num_last_layers]
    if not kept:
        raise ValueError(f"no target module lies in the last {num_last_layers} of {depth} decoder layers")
    return kept


def find_transformer(model: nn.Module) -> PreTrainedModel | None:
    """The outermost transformers model in ``model``, if there is one."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)


def language_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of ``model`` that processes text, and its name with a dot at the end ('' for all of it)."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _LANGUAGE_NAMES and not _OTHER_MODALITY.search(name):
            return f"{name}.", module
    transformer = find_transformer(model)
    if (
        transformer is not None
        and _is_encoder_decoder(model)
        and transformer.main_input_name != "input_ids"  # speech or image encoder: only the decoder is language
    ):
        decoder = transformer.get_decoder()
        return _name_of(model, decoder), decoder
    return "", model


def _is_encoder_decoder(model: nn.Module) -> bool:
    transformer = find_transformer(model)
    return transformer is not None and bool(getattr(transformer.config, "is_encoder_decoder", False))


def _cross_attention(root: nn.Module) -> Iterator[str]:
    """Names, a dot at the end, of numbered layers with cross-attention alone, and of that of the other layers."""
    for name, module in root.named_modules():
        parts = [child for child, _ in module.named_children()] if name.rpartition(".")[2].isdecimal() else []
        cross = [part for part in parts if _CROSS_ATTENTION.match(part)]
        has_self_attention = any(_SELF_ATTENTION.match(part) for part in parts)
        if cross:
            yield from (f"{name}.{part}." for part in cross) if has_self_attention else [f"{name}."]


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is wanted)


def _unwrapped_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their names, without what lies inside a layer that already carries an adapter."""
    wrapped: list[str] = []
    for name, module in root.named_modules():
        if wrapped and name.startswith(wrapped[-1]):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped.append(f"{name}.")
        yield name, module
