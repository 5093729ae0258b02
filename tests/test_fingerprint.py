"""Fingerprints: what tells base weights apart, and what does not."""

from __future__ import annotations

import torch
from torch import nn

from dowser_peft.fingerprint import base_fingerprint, differs_from
from dowser_peft.targets import default_targets
from tests import models


def test_fingerprints() -> None:
    model = models.tiny_llama()
    modules = {name: model.get_submodule(name) for name in default_targets(model)}
    fingerprint = base_fingerprint(modules)
    assert not differs_from({f"wrapped.{name}": module for name, module in modules.items()}, fingerprint)
    assert not differs_from({name: module.half() for name, module in modules.items()}, fingerprint)
    assert differs_from(dict(list(modules.items())[1:]), fingerprint)
    modules["model.layers.1.mlp.up_proj"].weight.data.neg_()
    assert differs_from(modules, fingerprint)


def test_fingerprint_of_a_layer_with_more_weights_than_float32_can_count() -> None:
    """4096 x 11008 is beyond 2^24: an index computed in float32 would lie past the end."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16).expand(4096, 11008), requires_grad=False)
    layer.out_features, layer.in_features = 4096, 11008
    assert base_fingerprint({"layer": layer}) == base_fingerprint({"other": layer})
