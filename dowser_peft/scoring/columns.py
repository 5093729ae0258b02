"""Selection of whole input columns, in plain torch for CPU and GPU.

The importance of input j of a layer is that of all its weights together:

    S_j = sum_i S_ij = sum_i |W_ij| sum_n psi_n,i a_n,j = sum_n a_n,j (Psi |W|)_n,j

so one product ``Psi |W|``, ``[N, in]``, is all that is needed, accumulated over blocks of rows of W.
"""

from __future__ import annotations

import torch

from dowser_peft.scoring import check_arguments, num_trainable
from dowser_peft.scoring.blocks import RowBlocks, rows_of

_BLOCK_ELEMENTS = 1 << 20  # 8 MB of float64 at a time


@torch.no_grad()
def bottom_rho_columns(
    weight: torch.Tensor | RowBlocks, activation: torch.Tensor, sensitivity: torch.Tensor, rho: float
) -> torch.Tensor:
    """Ids of the ``round(rho * in)`` (at least one) input columns of lowest summed importance.

    Sums are taken in float64 (float32 on MPS, which has no other) and in a fixed order. Ties go to the lower id.

    Args:
        weight: ``[out, in]``, any float dtype and strides, or row blocks of a weight that does not exist as a whole.
        activation: ``a``, mean ``|h|`` per prompt, ``[N, in]``, non-negative.
        sensitivity: ``psi``, per prompt, ``[N, out]``, non-negative.
        rho: fraction of the columns that train, in (0, 1].

    Returns:
        int32 ``[k]``, ascending, on the device of ``weight``.

    Raises:
        ValueError: if shapes do not fit, ``rho`` is outside (0, 1], or the importance of a column is negative, NaN
            or infinite.
    """
    check_arguments(weight, activation, sensitivity, rho)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    activation = activation.to(weight.device, wide)
    sensitivity = sensitivity.to(weight.device, wide)
    out_features, in_features = weight.shape
    rows = max(1, _BLOCK_ELEMENTS // in_features)
    importance = torch.zeros(in_features, dtype=wide, device=weight.device)
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        block = rows_of(weight, start, stop).abs().to(wide)
        product = sensitivity[:, start:stop] @ block  # [N, rows] @ [rows, in]
        importance += (activation * product).sum(0)
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ValueError(
            "the importance of its columns holds a NaN, infinite or negative value: check the weight and the probe "
            "statistics"
        )
    chosen = importance.argsort(stable=True)[: num_trainable(in_features, rho)]
    return chosen.sort().values.int()
