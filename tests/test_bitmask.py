from __future__ import annotations

import numpy as np
import pytest
import torch

from dowser_peft import bitmask


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (64, 33), (0,)])
def test_pack_matches_numpy_and_unpacks(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.4
    packed = bitmask.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numpy().tolist() == np.packbits(mask.numpy().reshape(-1), bitorder="little").tolist()
    assert torch.equal(bitmask.unpack(packed, mask.numel()), mask.view(-1))
    assert torch.equal(bitmask.positions(packed, mask.numel()).long(), mask.view(-1).nonzero().view(-1))
    assert bitmask.count(packed) == int(mask.sum())


def test_positions_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask, "_CHUNK_BYTES", 3)
    mask = torch.rand(101) < 0.5
    found = bitmask.positions(bitmask.pack(mask), 101)
    assert found.dtype == torch.int32
    assert found.tolist() == mask.nonzero().view(-1).tolist()


def test_positions_refuses_a_wrong_size() -> None:
    with pytest.raises(ValueError, match="20 weights has 3 bytes, got 2"):
        bitmask.positions(torch.zeros(2, dtype=torch.uint8), 20)


def test_positions_refuses_a_bit_past_the_end() -> None:
    with pytest.raises(ValueError, match="set at 7, past the last of 7"):
        bitmask.positions(torch.tensor([128], dtype=torch.uint8), 7)


def test_has_padding_set() -> None:
    assert bitmask.has_padding_set(torch.tensor([128], dtype=torch.uint8), 7)
    assert not bitmask.has_padding_set(torch.tensor([127], dtype=torch.uint8), 7)
    assert not bitmask.has_padding_set(torch.tensor([255], dtype=torch.uint8), 8)
