"""The linear layer under an adapter: plain, fused or quantised; in memory, offloaded or partitioned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from dowser_peft.blockwise import BlockwiseWeight, Weight4bit, Weight8bit
from dowser_peft.fused_experts import FusedWeight
from dowser_peft.partitioned import gathered, whole_shape

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer itself, without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def quantisation_of(module: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend for a quantised layer, or None."""
    return resolve_quantization_backend(unwrapped(module), get_apply_tensor_subclass=lambda: None)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer: nn.Linear, transformers' Conv1D, or a quantised one."""
    return isinstance(unwrapped(module), nn.Linear | Conv1D) or quantisation_of(module) is not None


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer stores its weight as [in, out]."""
    return isinstance(unwrapped(module), Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    base: Any = unwrapped(module)
    return (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)


def scored_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of what has scores and a mask of its own: a linear layer, or one of fused experts."""
    return layer.expert_shape if isinstance(layer, FusedWeight) else linear_shape(layer)


def maps_features(module: nn.Module) -> bool:
    """Whether ``module`` says that it maps ``in_features`` to ``out_features``, in whatever format its weight is."""
    base = unwrapped(module)
    return is_linear(base) or all(isinstance(getattr(base, f"{end}_features", None), int) for end in ("in", "out"))


def is_at_hand(module: nn.Module) -> bool:
    """Whether the weight can be read: it is in memory, or elsewhere in a way that brings it back."""
    base: Any = unwrapped(module)
    weight = getattr(base, "weight", None)  # HQQ and compressed-tensors have none of that name
    return not isinstance(weight, torch.Tensor) or weight.device.type != "meta" or has_offloaded_params(base)


def has_weight(module: nn.Module) -> bool:
    """Whether the layer came with its weight, in whatever format: quantised layers do."""
    return quantisation_of(module) is not None or is_at_hand(module)


def is_plain(module: nn.Module) -> bool:
    """Whether an unquantised layer computes ``x W^T + b`` and nothing else, on a matrix of ordinary floats."""
    base: Any = unwrapped(module)
    if stored_dtype(base) not in FLOAT_DTYPES:
        return False
    if isinstance(base, FusedWeight):
        return True
    # Of the class: accelerate replaces the forward of an instance. FalconLinear only orders the same sum otherwise.
    is_linear_map = type(base).forward in (nn.Linear.forward, Conv1D.forward) or type(base).__name__ == "FalconLinear"
    stored_shape = linear_shape(base)[::-1] if is_transposed(base) else linear_shape(base)
    return is_linear_map and whole_shape(base.weight) == tuple(stored_shape)


def stored_dtype(module: nn.Module) -> torch.dtype | None:
    """Dtype of the weight; None if there is no tensor of that name (HQQ, compressed-tensors)."""
    weight = getattr(unwrapped(module), "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) else None


def passes_gradients(module: nn.Module) -> bool:
    """Whether the gradient of a layer's output reaches its input.

    Not where torchao quantises the input as well ("dynamic activation"): what such a layer returns is cut off from
    autograd. Only running the layer tells, and only torchao's are run.
    """
    base: Any = unwrapped(module)
    backend = quantisation_of(base)
    if backend is None or backend.backend_name != "torchao" or base.weight.device.type == "meta":
        return True
    with torch.enable_grad():
        x = torch.ones(1, base.in_features, dtype=base.weight.dtype, device=base.weight.device, requires_grad=True)
        return bool(base(x).requires_grad)


def has_readable_weight(module: nn.Module) -> bool:
    """Whether the weight is a plain matrix of ordinary floats, or can be dequantised to one."""
    backend = quantisation_of(module)
    return is_plain(module) if backend is None else backend.supports_merge


def onloaded(base: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter of an offloaded layer, on the device where the layer runs."""
    with align_module_device(base):
        parameter = getattr(base, name)
        return None if parameter is None else parameter.detach()


@contextmanager
def _at_hand(base: nn.Module) -> Iterator[None]:
    """The weight brought back from offloading, or gathered from all processes, while the block runs."""
    with align_module_device(base), gathered([getattr(base, "weight", None)]):
        yield


@contextmanager
def base_weight(module: nn.Module) -> Iterator[torch.Tensor]:
    """The weight as it is stored, dequantised, brought back from offloading or gathered while the block runs."""
    base: Any = unwrapped(module)
    with _at_hand(base):
        backend = quantisation_of(base)
        if backend is None:
            yield base.weight.detach()
        else:
            unpack_4bit(base)
            yield backend.get_base_weight(base).detach()


@contextmanager
def scorable_weight(module: nn.Module) -> Iterator[torch.Tensor | BlockwiseWeight]:
    """The weight as it is stored while the block runs; one of bitsandbytes is dequantised a few rows at a time."""
    base: Any = unwrapped(module)
    with _at_hand(base):
        weight: Any = getattr(base, "weight", None)
        if type(weight).__name__ == "Params4bit" and Weight4bit.fits(weight.quant_state):
            unpack_4bit(base)
            yield Weight4bit(base.weight.data, base.weight.quant_state)
        elif type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
            scale = weight.SCB if base.state.SCB is None else base.state.SCB
            yield Weight8bit(weight.data, scale.to(weight.device))
        else:
            with base_weight(module) as plain:
                yield plain


def unpack_4bit(base: nn.Module) -> None:
    """Undo bitsandbytes' CPU inference layout, which neither differentiates nor dequantises.

    On a CPU with AVX512-BF16, Linear4bit rearranges its weight in place at the first forward pass in eval
    mode whose input needs no gradient.
    """
    state: Any = getattr(getattr(base, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        weight: Any = base.weight
        weight.data, weight.quant_state = _convert_weight_packed_for_cpu_inverse(weight.data, state)


@contextmanager
def differentiable_4bit(model: nn.Module) -> Iterator[None]:
    """Keep every 4-bit layer of ``model`` in the layout that gradients flow through."""
    packable: list[Any] = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
    try:
        for layer in packable:
            layer.support_avx512bf16_for_cpu = False
            unpack_4bit(layer)
        yield
    finally:
        for layer in packable:
            layer.support_avx512bf16_for_cpu = True
