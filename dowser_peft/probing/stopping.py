"""When a probe may end: how far the mask still is from the one that ever more prompts would give.

The mean of N independent prompts and the mean of a random half of them differ by a variance of

    Var(mean over N/2 - mean over N) = sigma^2 / (N/2) - sigma^2 / N = sigma^2 / N = Var(mean over N - its limit)

so half of the prompts moves the mask as far from that of all prompts as that of all prompts is, in expectation,
from its limit. The *mask error* is this distance: the share of the trained weights that the other mask does not
train. It is estimated on a sample of weights per layer and averaged over random halves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_SPLITS = 4  # random halvings; both halves count
_FIRST_ROUND = 16  # prompts, whatever the batch size
_STEP = 8  # they are added in multiples of this


@dataclass(frozen=True)
class WeightSample:
    """Some weights of one module.

    Args:
        rows: ``i`` of each sampled weight ``W_ij``, int64 ``[E]``.
        columns: ``j``, int64 ``[E]``.
        magnitudes: ``|W_ij|``, float32 ``[E]``.
        numel: weights of the whole module.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    magnitudes: torch.Tensor
    numel: int


@dataclass(frozen=True)
class StoppingRule:
    """Probe in growing rounds until the mask error is at most ``tolerance``.

    Args:
        tolerance: the largest mask error to accept, in (0, 1).
        rho: of the masks that are compared.
        samples: per module, the weights to compare them on.
    """

    tolerance: float
    rho: float
    samples: Mapping[str, WeightSample]

    def first_round(self, limit: int) -> int:
        """How many prompts to probe before the first look."""
        return min(limit, _FIRST_ROUND)

    def next_round(self, num_prompts: int, error: float, limit: int) -> int:
        """How many prompts to have probed before the next look: where an error that falls with ``1 / sqrt(N)``
        would be small enough, but at most twice as many as now.
        """
        needed = num_prompts * min(2.0, (error / self.tolerance) ** 2)
        return min(limit, max(num_prompts + _STEP, _STEP * math.ceil(needed / _STEP)))

    def mask_error(self, activations: Mapping[str, torch.Tensor], sensitivities: Mapping[str, torch.Tensor]) -> float:
        """The expected mask error of these statistics: 1 if there is only one row, of which there are no halves.

        Args:
            activations: per module, A ``[N, in]``.
            sensitivities: per module, Psi ``[N, out]``.
        """
        num_rows = next(iter(sensitivities.values())).shape[0]
        if num_rows < 2:
            return 1.0
        parts = _halves(num_rows)
        total, weighted = 0, 0.0
        for name, sample in self.samples.items():
            terms = sensitivities[name][:, sample.rows] * activations[name][:, sample.columns]  # [N, E]
            scores = (parts @ terms) * sample.magnitudes  # [1 + 2 * splits, E]
            k = max(1, round(self.rho * scores.shape[1]))
            chosen = torch.zeros(scores.shape, dtype=torch.bool)
            chosen.scatter_(1, scores.topk(k, largest=False).indices, True)
            common = (chosen[0] & chosen[1:]).sum(1).double() / k
            weighted += sample.numel * (1.0 - float(common.mean()))
            total += sample.numel
        return weighted / total


def _halves(num_rows: int) -> torch.Tensor:
    """Weights of the mean over all rows, and over both halves of some random splits, ``[1 + 2 * splits, N]``."""
    generator = torch.Generator().manual_seed(num_rows)  # the same halves for the same N: deterministic
    half = num_rows // 2
    parts = torch.zeros(1 + 2 * _SPLITS, num_rows)
    parts[0] = 1 / num_rows
    for split in range(_SPLITS):
        order = torch.randperm(num_rows, generator=generator)
        parts[1 + 2 * split, order[:half]] = 1 / half
        parts[2 + 2 * split, order[half:]] = 1 / (num_rows - half)
    return parts
