"""Other weights of the same function: base models in which |W| and the importance of a weight part ways.

``rescale-SIGMA``: in every gated MLP of the decoder, down(act(gate x) * (up x)), hidden unit i is written c_i times as
large and read 1/c_i times as strongly:

    up_proj row i   *= c_i          down_proj column i   /= c_i          c_i = 2^round(N(0, SIGMA) / ln 2)

that is log-normal to the next power of two. Multiplying by powers of two only moves exponents, so that the model's
outputs, and the prompts that it writes, are the same bit for bit. In the new coordinates z'_i = c_i z_i behind
up_proj, and h'_i = c_i h_i before down_proj, so with J' = df/dz'

    up_proj      |W'_ij| = c_i |W_ij|      ||J'_i|| = ||J_i|| / c_i     |h_j| unchanged     S'_ij = S_ij
    down_proj    |W'_ki| = |W_ki| / c_i    ||J_k|| unchanged            |h'_i| = c_i |h_i|  S'_ki = S_ki

and nothing else changes. The paper's score, and the exact one, measure the effect of a *relative* change of a
weight; neither notices the rescaling, and their masks stay the same. |W| is misled in both matrices: it prefers rows
of up_proj with small c and columns of down_proj with large c. |W| |h| is misled in up_proj, where only J would make up
for c, and not in down_proj, where h does. ||J|| |h| without |W| is misled in both.

What trains is not invariant, whatever the mask: AdamW moves every weight by about the learning rate, and in the old
coordinates that is lr / c_i for a weight of up_proj and lr * c_i for one of down_proj. Full fine-tuning, too, starts
from a worse conditioned problem at a larger SIGMA. Fair comparisons are between masks at one SIGMA, each at its own
best rate, with full fine-tuning to tell what the conditioning alone costs. And |W| does worse than err at random: the
weights that it prefers are those whose absolute steps move the function most.

``copies-K``: in every gated MLP of the decoder a quarter of the hidden units are there K times, and each copy is read
1/K as strongly: redundant neurons. The outputs stay the same but for rounding. S of a copy's weights is 1/K of what it
was, in gate_proj and up_proj because J is, in down_proj because W is; |W| and |W| |h| notice it in down_proj alone.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from torch import nn

from dowser_peft.targets import default_targets

SEED = 0  # one rescaling for each sigma, one choice of units
COPIED = 0.25
_RESCALE, _COPIES = "rescale-", "copies-"


def rescaling(sigma: float) -> str | None:
    """Name of the transform; None for no change."""
    return f"{_RESCALE}{sigma:g}" if sigma else None


def copying(copies: int) -> str:
    """Name of the transform."""
    return f"{_COPIES}{copies}"


def apply(model: nn.Module, name: str | None) -> nn.Module:
    """Transform ``model`` in place.

    Raises:
        ValueError: if there is no such transform, or the model has no gated MLP.
    """
    if name is None:
        return model
    found = re.fullmatch(rf"{_RESCALE}(\d+(?:\.\d+)?)|{_COPIES}([1-9]\d*)", name)
    if found is None:
        raise ValueError(
            f"unknown transform {name!r}: there are {_RESCALE}SIGMA, such as {rescaling(1)!r}, and {_COPIES}K, such "
            f"as {copying(4)!r}"
        )
    sigma, copies = found.groups()
    return rescale(model, float(sigma)) if sigma else copy_units(model, int(copies))


@torch.no_grad()
def rescale(model: nn.Module, sigma: float) -> nn.Module:
    """Rescale the hidden units of the decoder's gated MLPs in place by powers of two."""
    for block in _gated_mlps(model):
        up, down = model.get_submodule(f"{block}up_proj"), model.get_submodule(f"{block}down_proj")
        scale = scales(block, up.out_features, sigma).to(up.weight)
        up.weight *= scale[:, None]
        if up.bias is not None:
            up.bias *= scale
        down.weight /= scale
    return model


@torch.no_grad()
def copy_units(model: nn.Module, copies: int) -> nn.Module:
    """Have a quarter of the hidden units of the decoder's gated MLPs ``copies`` times; in place, copies last."""
    for block in _gated_mlps(model):
        gate, up, down = (model.get_submodule(f"{block}{name}_proj") for name in ("gate", "up", "down"))
        units = copied_units(block, up.out_features).to(up.weight.device)
        repeated = units.repeat(copies - 1)
        for layer in (gate, up):
            layer.weight = nn.Parameter(torch.cat([layer.weight, layer.weight[repeated]]))
            if layer.bias is not None:
                layer.bias = nn.Parameter(torch.cat([layer.bias, layer.bias[repeated]]))
            layer.out_features = len(layer.weight)
        down.weight[:, units] /= copies
        down.weight = nn.Parameter(torch.cat([down.weight, down.weight[:, repeated]], dim=1))
        down.in_features = down.weight.shape[1]
    return model


def _gated_mlps(model: nn.Module) -> Iterator[str]:
    """Prefixes of the names of their matrices."""
    blocks = [name.removesuffix("up_proj") for name in default_targets(model) if name.endswith(".up_proj")]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no gated MLP (up_proj, down_proj) to transform")
    yield from blocks


def scales(block: str, units: int, sigma: float) -> torch.Tensor:
    """c of each hidden unit, float32 ``[units]``; always the same for a block and a sigma."""
    return torch.exp2((sigma / math.log(2) * torch.randn(units, generator=_generator(block))).round())


def copied_units(block: str, units: int) -> torch.Tensor:
    """Which of a block's hidden units :func:`copy_units` copies, always the same."""
    return torch.randperm(units, generator=_generator(block))[: round(COPIED * units)]


def _generator(block: str) -> torch.Generator:
    digest = hashlib.sha256(f"{SEED}:{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
