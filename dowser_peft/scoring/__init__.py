"""Selection: from the two factors of the score to the mask of the least important weights.

The importance of weight (i, j) of a layer is (paper, Eq. for S; DESIGN of this package):

    S_ij = |W_ij| * sum_n psi_n,i * a_n,j        psi: sensitivity of output i, a: activation of input j

so a layer's score matrix is |W| times one small GEMM, and it never has to exist as a whole. Which weights
train is decided per layer: the ``num_trainable(numel, rho)`` lowest scores.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from dowser_peft.scoring import torch_backend
from dowser_peft.scoring.blocks import RowBlocks


def num_trainable(numel: int, rho: float) -> int:
    """How many of ``numel`` weights train: ``round(rho * numel)``, half to even, but never fewer than one."""
    return max(1, round(rho * numel))


def bottom_rho_mask(
    weight: torch.Tensor | RowBlocks,
    activation: torch.Tensor,
    sensitivity: torch.Tensor,
    rho: float,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Mask of the ``round(rho * numel)`` (at least one) weights of lowest importance.

    Ties go to the lower flat index, so the mask is unique, up to rounding in the scores: the backends sum over
    the prompts in different orders. The score matrix never exists: beside the mask, the extra memory does not
    grow with the layer.

    Args:
        weight: ``[out, in]``, any float dtype, any strides; or row blocks of a weight that does not exist as a
            whole (:class:`~dowser_peft.scoring.blocks.RowBlocks`).
        activation: ``a``, mean ``|h|`` per prompt, ``[N, in]``, non-negative.
        sensitivity: ``psi``, per prompt, ``[N, out]``, non-negative.
        rho: fraction of the weights that train, in (0, 1].
        backend: 'triton' (kernels for CUDA), 'torch' (any device), or 'auto': Triton where it can run.

    Returns:
        Packed mask, uint8 ``[ceil(out * in / 8)]`` on the device of ``weight``; see :mod:`dowser_peft.bitmask`.

    Raises:
        ValueError: if shapes do not fit, ``rho`` is outside (0, 1], the backend cannot run on this device, or a
            score is NaN, infinite or negative (the message names its rows).
    """
    check_arguments(weight, activation, sensitivity, rho)
    activation = activation.to(weight.device, torch.float32)
    sensitivity = sensitivity.to(weight.device, torch.float32)
    k = num_trainable(weight.shape.numel(), rho)
    if _uses_triton(backend, weight.device):
        from dowser_peft.scoring import triton_backend

        return triton_backend.bottom_k_mask(weight, activation, sensitivity, k)
    return torch_backend.bottom_k_mask(weight, activation, sensitivity, k)


def check_arguments(
    weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float
) -> None:
    """Check the arguments of a selection.

    Raises:
        ValueError: if shapes do not fit, or ``rho`` is outside (0, 1].
    """
    if not 0.0 < rho <= 1.0:
        raise ValueError(f"rho must be in (0, 1], got {rho}")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be a matrix [out, in], got shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    if activation.ndim != 2 or activation.shape[1] != in_features:
        raise ValueError(f"activation must be [N, {in_features}], got {tuple(activation.shape)}")
    if sensitivity.ndim != 2 or sensitivity.shape[1] != out_features:
        raise ValueError(f"sensitivity must be [N, {out_features}], got {tuple(sensitivity.shape)}")
    if activation.shape[0] != sensitivity.shape[0]:
        raise ValueError(f"activation has {activation.shape[0]} prompts but sensitivity has {sensitivity.shape[0]}")


def _uses_triton(backend: str, device: torch.device) -> bool:
    if backend == "auto":
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs the weight on a CUDA device, not on {device}: use 'auto' or 'torch'")
    return backend == "triton"


__all__ = ["bottom_rho_mask", "check_arguments", "num_trainable"]
