"""Selection: from the two factors of the score to the mask of the least important weights.

The importance of weight (i, j) of a layer is (paper, Eq. for S; DESIGN of this package):

    S_ij = |W_ij| * sum_n psi_n,i * a_n,j        psi: sensitivity of output i, a: activation of input j

so a layer's score matrix is |W| times one small GEMM, and it never has to exist as a whole. Which weights
train is decided per layer: the ``num_trainable(numel, rho)`` lowest scores.
"""

from __future__ import annotations

import torch

from dowser_peft.scoring import torch_backend


def num_trainable(numel: int, rho: float) -> int:
    """How many of ``numel`` weights train: ``round(rho * numel)``, half to even, but never fewer than one."""
    return max(1, round(rho * numel))


def bottom_rho_mask(
    weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float
) -> torch.Tensor:
    """Mask of the ``round(rho * numel)`` (at least one) weights of lowest importance.

    Ties go to the lower flat index, so the mask is unique. Rows are scored in blocks: the extra memory does
    not grow with the layer.

    Args:
        weight: ``[out, in]``, any float dtype.
        activation: ``a``, mean ``|h|`` per prompt, ``[N, in]``, non-negative.
        sensitivity: ``psi``, per prompt, ``[N, out]``, non-negative.
        rho: fraction of the weights that train, in (0, 1].

    Returns:
        Packed mask, uint8 ``[ceil(out * in / 8)]`` on the device of ``weight``; see :mod:`dowser_peft.bitmask`.

    Raises:
        ValueError: if shapes do not fit, ``rho`` is outside (0, 1], or a score is NaN or infinite.
    """
    check_factors(weight, activation, sensitivity, rho)
    return torch_backend.bottom_k_mask(weight, activation, sensitivity, num_trainable(weight.numel(), rho))


def check_factors(weight: torch.Tensor, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float) -> None:
    """Check the arguments of a selection.

    Raises:
        ValueError: if shapes do not fit, or ``rho`` is outside (0, 1].
    """
    if not 0.0 < rho <= 1.0:
        raise ValueError(f"rho must be in (0, 1], got {rho}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix [out, in], got shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if activation.ndim != 2 or activation.shape[1] != in_features:
        raise ValueError(f"activation must be [N, {in_features}], got {tuple(activation.shape)}")
    if sensitivity.ndim != 2 or sensitivity.shape[1] != out_features:
        raise ValueError(f"sensitivity must be [N, {out_features}], got {tuple(sensitivity.shape)}")
    if activation.shape[0] != sensitivity.shape[0]:
        raise ValueError(f"activation has {activation.shape[0]} prompts but sensitivity has {sensitivity.shape[0]}")


__all__ = ["bottom_rho_mask", "check_factors", "num_trainable"]
