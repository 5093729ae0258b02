"""The sparse delta of a linear layer: ``y = x (W + scatter(values))^T + b``.

``scatter_delta`` is the effective weight in forward and backward; a merge writes the same sums, by
``add_once_rounded``, to the entries that change. So merged and unmerged outputs agree bit for bit.

    function.py         the layer as one autograd function, eager and compiled
    ops.py              effective weight and gather: which backend; the operators that torch.compile sees
    torch_backend.py    by flat positions
    triton_backend.py   straight from the packed mask, on a GPU
    index.py            what is derived from a mask
    scratch.py          memory of the effective weight on a CPU
    rebuilding.py       effective weights that other layers compute with, not kept for backward
"""

from dowser_peft.sparse_delta.function import scatter_delta, sparse_delta_linear, sparse_delta_weight
from dowser_peft.sparse_delta.index import marked, positions_of
from dowser_peft.sparse_delta.rebuilding import rebuilt_in_backward
from dowser_peft.sparse_delta.torch_backend import add_once_rounded

__all__ = [
    "add_once_rounded",
    "marked",
    "positions_of",
    "rebuilt_in_backward",
    "scatter_delta",
    "sparse_delta_linear",
    "sparse_delta_weight",
]
