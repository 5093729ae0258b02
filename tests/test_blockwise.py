"""Quantised weights a few rows at a time: bit for bit the rows of the whole dequantisation."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

from dowser_peft import bottom_rho_mask
from dowser_peft.base_layer import base_weight, scorable_weight
from dowser_peft.blockwise import BlockwiseWeight, Weight4bit


def quantised(kind: str, out_features: int, in_features: int, blocksize: int = 64) -> nn.Module:
    if kind == "int8":
        layer: nn.Module = Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
    else:
        quant_type, _, double = kind.partition(" ")
        layer = Linear4bit(in_features, out_features, False, torch.float32, bool(double), quant_type)
        layer.weight.blocksize = blocksize
    return layer.to("cpu")  # quantises


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "fp4", "int8"])
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("shape", [(48, 256), (600, 512)])
def test_rows_and_entries_are_those_of_the_whole(kind: str, blocksize: int, shape: tuple[int, int]) -> None:
    layer = quantised(kind, *shape, blocksize)
    with base_weight(layer) as whole, scorable_weight(layer) as weight:
        assert isinstance(weight, BlockwiseWeight) and weight.shape == whole.shape == shape
        if kind != "int8":
            assert layer.weight.quant_state.blocksize == blocksize
            assert torch.equal(whole, dequantize_bnb_weight(layer.weight, layer.weight.quant_state))
        for start, stop in [(0, shape[0]), (8, 16), (3, 4), (shape[0] - 5, shape[0])]:
            assert torch.equal(weight.rows(start, stop), whole[start:stop])
        rows, columns = torch.randint(shape[0], (99,)), torch.randint(shape[1], (99,))
        torch.testing.assert_close(weight.entries(rows, columns), whole[rows, columns], rtol=2**-7, atol=0)


@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_mask_is_that_of_the_whole(kind: str, backend: str) -> None:
    layer = quantised(kind, 100, 192)
    activation, sensitivity = torch.ones(1, 192), torch.ones(1, 100)
    with base_weight(layer) as whole, scorable_weight(layer) as weight:
        expected = bottom_rho_mask(whole, activation, sensitivity, 0.1, backend="torch")
        assert torch.equal(bottom_rho_mask(weight, activation, sensitivity, 0.1, backend=backend), expected)


def test_rows_that_split_a_block_are_dequantised_whole() -> None:
    layer = quantised("nf4", 40, 36)
    with base_weight(layer) as whole, scorable_weight(layer) as weight:
        assert torch.equal(weight, whole)


def test_other_layers_are_read_whole() -> None:
    layer = nn.Linear(3, 2)
    with scorable_weight(layer) as weight:
        assert weight.data_ptr() == layer.weight.data_ptr()


def test_the_scales_of_double_quantisation_are_unpacked_once() -> None:
    layer = quantised("nf4 double", 64, 128)
    weight = Weight4bit(layer.weight.data, layer.weight.quant_state)
    assert weight._scales.dtype == torch.float32 and weight._scales.numel() == 64 * 128 // 64
