"""Other weights of the same function: base models that differ in nothing but what |W| can see.

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
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn

from dowser_peft.targets import default_targets

SEED = 0  # one rescaling for each sigma
_PREFIX = "rescale-"


def rescaling(sigma: float) -> str | None:
    """Name of the transform; None for no change."""
    return f"{_PREFIX}{sigma:g}" if sigma else None


def apply(model: nn.Module, name: str | None) -> nn.Module:
    """Transform ``model`` in place.

    Raises:
        ValueError: if there is no such transform, or the model has no gated MLP.
    """
    if name is None:
        return model
    try:
        sigma = float(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else math.nan
    except ValueError:
        sigma = math.nan
    if not 0 <= sigma < math.inf:
        raise ValueError(f"unknown transform {name!r}: there is {_PREFIX}SIGMA, such as {rescaling(1)!r}")
    return rescale(model, sigma)


@torch.no_grad()
def rescale(model: nn.Module, sigma: float) -> nn.Module:
    """Rescale the hidden units of the decoder's gated MLPs in place by powers of two."""
    blocks = [name.removesuffix("up_proj") for name in default_targets(model) if name.endswith(".up_proj")]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no gated MLP (up_proj, down_proj) to rescale")
    for block in blocks:
        up, down = model.get_submodule(f"{block}up_proj"), model.get_submodule(f"{block}down_proj")
        scale = scales(block, up.out_features, sigma).to(up.weight)
        up.weight *= scale[:, None]
        if up.bias is not None:
            up.bias *= scale
        down.weight /= scale
    return model


def scales(block: str, units: int, sigma: float) -> torch.Tensor:
    """c of each hidden unit, float32 ``[units]``; always the same for a block and a sigma."""
    digest = hashlib.sha256(f"{SEED}:{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.exp2((sigma / math.log(2) * torch.randn(units, generator=generator)).round())
