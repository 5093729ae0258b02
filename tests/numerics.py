"""How results are compared: against a truth in higher precision, no worse than torch in the same dtype."""

from __future__ import annotations

import torch

# Absolute slack per dtype, relative to the largest entry of the truth: a few units in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_no_worse_than_baseline(
    result: torch.Tensor, baseline: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> None:
    """Elementwise: error of ``result`` <= error of ``baseline`` (torch in ``dtype``) plus the tolerance."""
    truth = truth.double()
    error, allowed = (result.double() - truth).abs(), (baseline.double() - truth).abs()
    slack = TOLERANCE[dtype] * truth.abs().max().clamp(min=1e-30)
    worst = (error - allowed).max()
    assert worst <= slack, f"error exceeds that of torch by {worst:.3e}, allowed {slack:.3e}"
