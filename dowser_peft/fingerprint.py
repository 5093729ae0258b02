"""Fingerprints of base weights: was an adapter, or a probe, made for the weights of this model?"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from dowser_peft.base_layer import base_weight, has_readable_weight, is_at_hand, linear_shape, quantisation_of
from dowser_peft.fused_experts import layers_named
from dowser_peft.ranks import meet_to_run

_SAMPLES = 256  # weights per module
_QUANTISED = "-quantised"


def base_fingerprint(modules: dict[str, Any]) -> str:
    """Hash of the shapes of ``modules`` and the signs of some evenly spaced weights: tells base weights apart.

    Signs, because they survive a change of dtype. Names and order are left out, because they depend on the
    wrapper. Quantisation changes signs: such a fingerprint ends in "-quantised" and compares with no other. Of a
    weight that cannot be read, the shape alone counts.
    """
    digests = []
    for module in modules.values():
        if not has_readable_weight(module):
            digests.append(hashlib.sha256(repr(linear_shape(module)).encode()).digest())
            continue
        with base_weight(module) as weight:
            flat = weight.reshape(-1)
            steps = torch.arange(_SAMPLES, device=flat.device)
            where = steps * (flat.numel() - 1) // (_SAMPLES - 1)  # integers: float32 ends at 2^24
            signs = torch.signbit(flat[where]).cpu().numpy().tobytes()
            digests.append(hashlib.sha256(repr(tuple(weight.shape)).encode() + signs).digest())
    quantised = any(_is_quantised(module) for module in modules.values())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16] + (_QUANTISED if quantised else "")


def agreed_fingerprint(model: nn.Module, names: list[str]) -> str:
    """:func:`base_fingerprint` of the modules in ``names``, on every rank that of the first."""
    ranks = meet_to_run(model, "add a new adapter", sorted(names))
    found = ""
    with ranks.together():
        if ranks.is_first:
            found = base_fingerprint(layers_named(model, names))
    return ranks.share(found)


def differs_from(modules: dict[str, Any], fingerprint: str) -> bool:
    """Whether ``modules`` surely have other base weights; quantised ones, or none in memory, cannot tell."""
    if is_of_quantised_base(fingerprint):
        return False
    if any(_is_quantised(module) or not is_at_hand(module) for module in modules.values()):
        return False
    return base_fingerprint(modules) != fingerprint


def is_of_quantised_base(fingerprint: str | None) -> bool:
    """Whether a fingerprint was taken on a quantised model."""
    return fingerprint is not None and fingerprint.endswith(_QUANTISED)


def _is_quantised(module: Any) -> bool:
    """Whether the signs of the weight are not those of the base model, or cannot be read."""
    return quantisation_of(module) is not None or not has_readable_weight(module)
