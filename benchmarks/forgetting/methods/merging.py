"""Post-merge methods: fine-tune in full, then keep only a part of the delta.

Grafting      the top share rho of the whole delta by magnitude (the magnitude form of skill localisation,
              arXiv 2302.06600)
DARE          each entry is dropped with probability 1 - rho, the rest divided by rho (arXiv 2311.03099)
Model Tailor  a patch of rho of each layer, chosen by salience and sensitivity, refitted (arXiv 2402.12048)
half-way      half of the delta everywhere (WiSE-FT with weight 1/2, arXiv 2109.01903)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.forgetting.methods.full import Delta, post_merge, shifted
from benchmarks.forgetting.methods.interface import Data, Settings
from dowser_peft.scoring import num_trainable

CALIBRATION_BATCHES = 8
DAMPING = 0.01  # of the mean diagonal of H, as in the authors' code (and SparseGPT's)
HALF = 0.5


def keep_largest(delta: Delta, rho: float) -> Delta:
    """Grafting: the ``round(rho * n)`` entries of largest magnitude among all layers, the rest zero."""
    magnitudes = torch.cat([change.abs().reshape(-1) for change in delta.values()])
    kept = torch.zeros_like(magnitudes, dtype=torch.bool)
    kept[magnitudes.topk(num_trainable(magnitudes.numel(), rho)).indices] = True
    masks = kept.split([change.numel() for change in delta.values()])
    return {
        name: torch.where(mask.view_as(change), change, 0.0)
        for (name, change), mask in zip(delta.items(), masks, strict=True)
    }


def drop_and_rescale(delta: Delta, rho: float, seed: int) -> Delta:
    """DARE: every entry survives with probability rho and is then divided by rho."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(change.shape, generator=generator) < rho, change / rho, 0.0)
        for name, change in delta.items()
    }


def interpolate(delta: Delta, share: float) -> Delta:
    return {name: share * change for name, change in delta.items()}


def tailored_patch(delta: Tensor, hessian: Tensor, rho: float) -> Tensor:
    """Model Tailor's patch of one layer.

    With H the second moment of the layer's inputs on the new task, an entry's salience is |D_ij| and its
    sensitivity what dropping it costs (Optimal Brain Surgeon), D_ij^2 / [H^-1]_jj. Both are standardised within
    each output row and averaged; the top rho of the layer make the patch. The patch is then decorated: in each row
    the kept entries K take the values that bring the row's output on the task closest to that of the full delta,

        min_p E[((D_i - p) x)^2]   =>   p_K = (H_KK)^-1 (H D_i)_K,

    which is the compensation of Optimal Brain Surgeon for all dropped entries of the row at once. (The authors'
    code sweeps the columns one by one in blocks of 128, weighs the fine-tuned weight instead of the delta, and adds
    the compensation with the other sign; here it is as derived.)

    Args:
        delta: D, ``[out, in]``.
        hessian: H, ``[in, in]``.
        rho: share of the entries in the patch.

    Returns:
        The patch, ``[out, in]``, zero outside of it.
    """
    hessian = hessian.double()
    hessian = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    delta = delta.double()
    inverse = torch.linalg.inv(hessian).diagonal()  # [in]
    score = 0.5 * _standardised(delta.abs()) + 0.5 * _standardised(delta**2 / inverse)
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[score.view(-1).topk(num_trainable(delta.numel(), rho)).indices] = True
    patch = torch.zeros_like(delta)
    for row, (change, kept) in enumerate(zip(delta, mask.view_as(delta), strict=True)):
        if kept.any():
            patch[row, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ change)
    return patch.float()


def _standardised(scores: Tensor) -> Tensor:
    deviation = scores.std(dim=1, keepdim=True)
    return (scores - scores.mean(dim=1, keepdim=True)) / torch.where(deviation > 0, deviation, 1.0)


@torch.no_grad()
def input_second_moments(model: nn.Module, names: list[str], data: Data, seed: int) -> dict[str, Tensor]:
    """H = mean of x x^T over the real tokens of some downstream batches, ``[in, in]`` per module."""
    moments: dict[str, Tensor] = {}
    tokens: dict[str, int] = dict.fromkeys(names, 0)
    mask: Tensor

    def add_inputs(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0][mask].double()  # [tokens, in]
        moments[name] = moments.get(name, 0.0) + x.T @ x
        tokens[name] += len(x)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: add_inputs(name, inputs))
        for name in names
    ]
    try:
        model.eval()
        for batch in data.train(CALIBRATION_BATCHES, seed):
            mask = batch["attention_mask"].bool()
            model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    return {name: moment / tokens[name] for name, moment in moments.items()}


def _tailor(delta: Delta, model: nn.Module, data: Data, settings: Settings) -> Delta:
    with shifted(model, delta):
        moments = input_second_moments(model, list(delta), data, settings.seed)
    return {name: tailored_patch(change, moments[name], settings.rho) for name, change in delta.items()}


grafting = post_merge(lambda delta, model, data, settings: keep_largest(delta, settings.rho))
dare = post_merge(lambda delta, model, data, settings: drop_and_rescale(delta, settings.rho, settings.seed))
half_way = post_merge(lambda delta, model, data, settings: interpolate(delta, HALF))
model_tailor = post_merge(_tailor)
