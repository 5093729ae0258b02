"""What is derived from a mask is remembered, and never stale."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from dowser_peft import bitmask
from dowser_peft.sparse_delta.index import marked, offsets_of, positions_of


def packed(numel: int = 100) -> torch.Tensor:
    return bitmask.pack(torch.rand(numel) < 0.3)


def test_remembered_until_the_mask_is_written() -> None:
    mask = packed()
    first = positions_of(mask, 100)
    assert positions_of(mask, 100) is first and marked(mask, 100) == first.numel()
    other = packed()
    mask.copy_(other)
    assert torch.equal(positions_of(mask, 100), bitmask.positions(other, 100))
    assert marked(mask, 100) == bitmask.count(other)


def test_a_copy_of_a_mask_is_another_mask() -> None:
    mask = packed()
    first = positions_of(mask, 100)
    assert positions_of(copy.deepcopy(mask), 100) is not first


def test_forgotten_with_the_mask() -> None:
    mask = packed()
    known = weakref.ref(positions_of(mask, 100))
    del mask
    gc.collect()
    assert known() is None


def test_nothing_is_remembered_for_a_tensor_that_does_not_count_its_writes() -> None:
    with torch.inference_mode():
        mask = packed()
        first = positions_of(mask, 100)
        mask.copy_(packed())
        assert not torch.equal(positions_of(mask, 100), first)


def test_found_in_inference_mode_and_used_for_training() -> None:
    mask = packed()
    with torch.inference_mode():
        found = positions_of(mask, 100)
    assert not found.is_inference() and positions_of(mask, 100) is found


def test_offsets_are_remembered_by_the_same_rule() -> None:
    mask, calls = packed(), []

    def derive(mask: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return mask.long().cumsum(0)

    offsets_of(mask, derive)
    offsets_of(mask, derive)
    assert len(calls) == 1
    mask[0] ^= 1
    assert torch.equal(offsets_of(mask, derive), mask.long().cumsum(0)) and len(calls) == 2


def test_a_mask_of_another_size() -> None:
    with pytest.raises(ValueError, match="a mask of 200 weights has 25 bytes, got 13"):
        positions_of(packed(), 200)
