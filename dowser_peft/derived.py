"""The configuration of an adapter that was made from others, not chosen by a probe.

Its layers need not train the same fraction, so its configuration says for each of them exactly how much: loading
allocates by ``rho`` before it opens the file.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import nn

from dowser_peft.config import DowserConfig
from dowser_peft.injection import match_exactly
from dowser_peft.scoring import num_trainable


class Size(NamedTuple):
    """How much of a module trains: ``trained`` of ``total`` weights, or columns."""

    trained: int
    total: int


def derived_config(model: nn.Module, like: DowserConfig, sizes: dict[str, Size]) -> DowserConfig:
    """A configuration with the settings of ``like`` for exactly these modules of ``model``, at these sizes."""
    rho = sum(size.trained for size in sizes.values()) / sum(size.total for size in sizes.values())
    is_even = all(num_trainable(size.total, rho) == size.trained for size in sizes.values())
    config = dataclasses.replace(
        like,
        rho=rho,
        # k / n * n rounds to k for every k < 2^52
        rho_pattern={} if is_even else {name: size.trained / size.total for name, size in sizes.items()},
        target_modules=list(sizes),
        exclude_modules=None,
        num_last_layers=None,
        layers_to_transform=None,
        layers_pattern=None,
        base_fingerprint=None,
    )
    match_exactly(model, config, list(sizes))
    config._recorded_probe = dict(like._recorded_probe)
    return config
