"""The sparse delta of a linear layer: ``y = x (W + scatter(values))^T + b``.

``scatter_delta`` is the one definition of the effective weight: forward, backward and merge all call it,
so merged and unmerged outputs agree bit for bit.
"""

from dowser_peft.sparse_delta.function import sparse_delta_linear
from dowser_peft.sparse_delta.torch_backend import scatter_delta

__all__ = ["scatter_delta", "sparse_delta_linear"]
