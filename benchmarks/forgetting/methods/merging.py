"""Post-merge methods: fine-tune in full, then keep only a part of the delta.

Grafting      the top share rho of the whole delta by magnitude (the magnitude form of skill localisation,
              arXiv 2302.06600)
DARE          each entry is dropped with probability 1 - rho, the rest divided by rho (arXiv 2311.03099)
Model Tailor  a patch of rho of each layer, chosen by salience and sensitivity, refitted (arXiv 2402.12048)
half-way      half of the delta everywhere (WiSE-FT with weight 1/2, arXiv 2109.01903)
"""

from __future__ import annotations

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from benchmarks.forgetting.methods.full import Delta, post_merge, shifted
from benchmarks.forgetting.methods.interface import Data, Settings
from dowser_peft.scoring import num_trainable

CALIBRATION_BATCHES = 8
DAMPING = 0.01  # of the mean diagonal of H, as in the authors' code (and SparseGPT's)
HALF = 0.5


def keep_largest(delta: Delta, rho: float) -> Delta:
    """Grafting: the ``round(rho * n)`` entries of largest magnitude among all layers, the rest zero; of entries that
    are equal to the smallest of these, the first ones."""
    left = num_trainable(sum(change.numel() for change in delta.values()), rho)
    threshold = kth_largest([change.abs() for change in delta.values()], left)
    left -= sum(int((change.abs() > threshold).sum()) for change in delta.values())
    kept = {}
    for name, change in delta.items():
        equal = (change.abs() == threshold).view(-1).nonzero().view(-1)[:left]
        left -= len(equal)
        mask = change.abs() > threshold
        mask.view(-1)[equal] = True
        kept[name] = torch.where(mask, change, 0.0)
    return kept


def kth_largest(magnitudes: list[Tensor], k: int) -> float:
    """The ``k``-th largest entry of all these tensors of non-negative float32, without sorting them together.

    Bit patterns of such numbers are in the order of the numbers: the upper half of the bits is found from a histogram
    of all entries, the lower half from one of the entries that share it.
    """
    upper = 0
    for shift, width in ((16, 16), (0, 16)):
        histogram = torch.zeros(1 << width, dtype=torch.int64)
        for magnitude in magnitudes:
            bits = magnitude.contiguous().view(torch.int32).view(-1)
            if shift == 0:
                bits = bits[bits >> 16 == upper]
            histogram += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << width)
        from_above = histogram.flip(0).cumsum(0)
        place = int((from_above < k).sum())
        k -= int(from_above[place - 1]) if place else 0
        found = (1 << width) - 1 - place
        upper = upper << 16 | found if shift == 0 else found
    return torch.tensor(upper, dtype=torch.int32).view(torch.float32).item()


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
        # A model that splices images into the text itself has more tokens than the batch says: then all count.
        x = inputs[0][mask] if inputs[0].shape[:2] == mask.shape else inputs[0].flatten(0, 1)
        x = x.double()  # [tokens, in]
        moments[name] = moments.get(name, 0.0) + x.T @ x
        tokens[name] += len(x)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: add_inputs(name, inputs))
        for name in names
    ]
    try:
        model.eval()
        device = next(model.parameters()).device
        for batch in data.train(CALIBRATION_BATCHES, seed):
            mask = batch["attention_mask"].bool().to(device)
            model(**send_to_device({key: value for key, value in batch.items() if key != "labels"}, device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (moment / tokens[name]).cpu() for name, moment in moments.items()}


def _tailor(delta: Delta, model: nn.Module, data: Data, settings: Settings) -> Delta:
    with shifted(model, delta):
        moments = input_second_moments(model, list(delta), data, settings.seed)
    return {name: tailored_patch(change, moments[name], settings.rho) for name, change in delta.items()}


grafting = post_merge(lambda delta, model, data, settings: keep_largest(delta, settings.rho))
dare = post_merge(lambda delta, model, data, settings: drop_and_rescale(delta, settings.rho, settings.seed))
half_way = post_merge(lambda delta, model, data, settings: interpolate(delta, HALF))
model_tailor = post_merge(_tailor)
