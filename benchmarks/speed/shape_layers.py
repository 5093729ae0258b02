"""What each fine-tuning method keeps for one linear layer, and allocates in forward and backward.

Each class replaces an ``nn.Linear`` in a model of shape-only tensors and does what the method does to memory,
no more: same parameters, buffers, saved tensors and temporaries, arithmetic of no interest. The peers are
written from PEFT 0.21's source (``tuners/{lora,shira,supertuning}/layer.py``) and from the authors' procedure;
``tests/benchmarks/test_speed_accounting.py`` holds every one of them against the real layers.

Temporaries are made under ``tracker.label(TEMPORARY)``, so that the largest one can be told from what
activations take. All code here runs under torch's FakeTensorMode: it never reads a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed.storage_tracker import TEMPORARY, StorageTracker
from dowser_peft.bitmask import packed_size
from dowser_peft.column_delta import add_column_delta
from dowser_peft.scoring import num_trainable
from dowser_peft.sparse_delta.torch_backend import SAMPLED_TOKENS, block_shape, is_sampled

OFFSET_CHUNK = 4096  # CHUNK of sparse_delta/triton_backend.py, which only imports where Triton is
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256  # bitsandbytes: weights per absmax, absmax values per float32 scale


@dataclass
class Setting:
    """What all layers of one account share.

    Args:
        rho: fraction of each target layer that trains (where the method allows).
        rank: of LoRA.
        device: 'cuda' or 'cpu': which indices are derived, and the precision regime of dense fine-tuning.
        nf4: the base is quantised to 4 bits with double quantisation.
        compute_dtype: of the matrix products.
        tracker: of the replayed step.
    """

    rho: float
    rank: int
    device: str
    nf4: bool
    compute_dtype: torch.dtype
    tracker: StorageTracker
    _scratch: torch.Tensor | None = None

    def scratch(self, shape: tuple[int, ...]) -> torch.Tensor:
        """The one buffer of all layers, on a CPU; see ``dowser_peft/sparse_delta/scratch.py``."""
        size = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = None
            with self.tracker.label(TEMPORARY):
                self._scratch = torch.empty(size, dtype=self.compute_dtype)
        return self._scratch[:size].view(shape)


class ShapeLayer(nn.Module):
    """A frozen linear layer: the weight as it is stored, and its product with x."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__()
        self.out_features, self.in_features = base.out_features, base.in_features
        self.numel = self.out_features * self.in_features
        self.setting, self.bias = setting, base.bias
        if setting.nf4:
            blocks = -(-self.numel // NF4_BLOCK)
            self.register_buffer("weight", torch.empty(-(-self.numel // 2), dtype=torch.uint8))
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
            # the scales of absmax, the two code books, and an offset
            outer = -(-blocks // NF4_OUTER_BLOCK)
            self.register_buffer("quantisation", torch.empty(outer + 16 + 256 + 1))
        else:
            self.weight = base.weight

    def temporary(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        with self.setting.tracker.label(TEMPORARY):
            return torch.empty(shape, dtype=dtype)

    def dense_weight(self) -> torch.Tensor:
        """The weight itself, or a dequantised copy."""
        if not self.setting.nf4:
            return self.weight
        self.temporary(self.numel // NF4_BLOCK, dtype=torch.float32)  # absmax, before the weight
        return self.temporary(self.out_features, self.in_features, dtype=self.setting.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenProduct.apply(x, self) if self.setting.nf4 else F.linear(x, self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: dequantises in forward and again in backward, keeps neither x nor W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: ShapeLayer) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        return grad_y @ ctx.layer.dense_weight(), None


class Element(ShapeLayer):
    """Dowser: values [k] in float32, one bit per weight; W_eff is made in forward and again in backward."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__(base, setting)
        k = num_trainable(self.numel, setting.rho)
        self.values = nn.Parameter(torch.empty(k))
        self.register_buffer("mask", torch.empty(packed_size(self.numel), dtype=torch.uint8))
        if setting.device == "cpu":
            self.register_buffer("indices", torch.empty(k, dtype=torch.int32))
        else:  # set bits before each chunk
            self.register_buffer("indices", torch.empty(-(-self.numel // OFFSET_CHUNK) + 1, dtype=torch.int64))

    def effective(self) -> torch.Tensor:
        weight = self.dense_weight()
        if self.setting.nf4:
            return weight  # the delta is added to the dequantised copy itself
        if self.setting.device == "cpu":
            return self.setting.scratch(weight.shape)
        return self.temporary(self.out_features, self.in_features, dtype=self.setting.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ElementProduct.apply(x.reshape(-1, x.shape[-1]), self.values, self).view(*x.shape[:-1], -1)


class _ElementProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, layer: Element) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return F.linear(x, layer.effective(), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        layer, (x,) = ctx.layer, ctx.saved_tensors
        grad_x = grad_y @ layer.effective() if ctx.needs_input_grad[0] else None
        with layer.setting.tracker.label(TEMPORARY):
            dense: Any
            if layer.setting.device == "cuda":
                dense = grad_y.T @ x  # [out, in]
            elif is_sampled([layer.indices], grad_y, x):  # entry by entry: their columns, the factors of some tokens
                factors = (part[:SAMPLED_TOKENS].T.contiguous() for part in (grad_y, x))
                dense = [torch.empty_like(layer.indices), *factors]
            else:
                dense = layer.setting.scratch(block_shape(layer.out_features, layer.in_features))  # by blocks of rows
            grad_values = torch.empty(layer.values.shape, dtype=torch.float32)
        del dense
        return grad_x, grad_values, None


class Column(ShapeLayer):
    """Dowser by columns: values [out, k] in float32, k ids; the delta itself is the package's own function."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__(base, setting)
        k = num_trainable(self.in_features, setting.rho)
        self.values = nn.Parameter(torch.empty(self.out_features, k))
        self.register_buffer("mask", torch.empty(k, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add_column_delta(super().forward(x), x, self.mask, self.values)


class Full(ShapeLayer):
    """Dense fine-tuning: a float32 layer as it is; a bfloat16 layer with a float32 master copy."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__(base, setting)
        self.weight.requires_grad_(True)
        if self.weight.dtype != torch.float32:
            self.register_buffer("master", torch.empty(self.weight.shape))


class MaskedFull(Full):
    """The authors' way: dense fine-tuning whose gradient is multiplied by a mask, one byte a weight."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__(base, setting)
        self.register_buffer("mask", torch.empty(self.weight.shape, dtype=torch.bool))
        self.weight.register_hook(self._masked)

    def _masked(self, gradient: torch.Tensor) -> torch.Tensor:
        with self.setting.tracker.label(TEMPORARY):
            return torch.where(self.mask, gradient, 0.0)  # a product would cast the mask


class Lora(ShapeLayer):
    """PEFT's LoRA: A and B in float32, so that x is cast to float32 and kept."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__(base, setting)
        self.a = nn.Parameter(torch.empty(setting.rank, self.in_features))
        self.b = nn.Parameter(torch.empty(self.out_features, setting.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = super().forward(x)
        update = F.linear(F.linear(x.to(self.a.dtype), self.a), self.b) * 2.0  # times lora_alpha / r
        return (result + update).to(x.dtype)


class Shira(ShapeLayer):
    """PEFT's SHiRA: int32 (row, column) per value; keeps W_eff and a sparse tensor (int64 indices) for backward."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__(base, setting)
        k = num_trainable(self.numel, setting.rho)
        self.values = nn.Parameter(torch.empty(k))
        self.register_buffer("indices", torch.empty(2, k, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _ShiraWeight.apply(self.values, self), self.bias)


class _ShiraWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, layer: Shira) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(layer.indices.to(torch.int64), values * 1.0)
        return torch.empty(layer.dense_weight().shape, dtype=layer.setting.compute_dtype)

    @staticmethod
    def backward(ctx: Any, grad_weight: torch.Tensor) -> Any:
        with ctx.layer.setting.tracker.label(TEMPORARY):
            return torch.empty(ctx.layer.values.shape), None


class SuperTuning(ShapeLayer):
    """PEFT's Super-Tuning: flat int32 indices, cast to int64 and kept for backward together with W_eff."""

    def __init__(self, base: nn.Linear, setting: Setting) -> None:
        super().__init__(base, setting)
        k = num_trainable(self.numel, setting.rho)
        self.values = nn.Parameter(torch.empty(k))
        self.register_buffer("indices", torch.empty(k, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.values.to(self.weight.dtype)
        effective = self.weight.reshape(-1).scatter_add(0, self.indices.to(torch.int64), values)
        return F.linear(x, effective.reshape_as(self.weight), self.bias)


METHODS: dict[str, Callable[[nn.Linear, Setting], ShapeLayer]] = {
    "Dowser": Element,
    "Dowser column": Column,
    "masked full fine-tuning": MaskedFull,
    "full fine-tuning": Full,
    "LoRA": Lora,
    "SHiRA": Shira,
    "Super-Tuning": SuperTuning,
}
# No 4-bit base: dense methods train the weight itself, and Super-Tuning fails in forward (PEFT 0.21.2).
WITHOUT_4BIT = ("masked full fine-tuning", "full fine-tuning", "Super-Tuning")
