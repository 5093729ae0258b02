"""One bit per weight: how a mask is stored.

Bit ``p % 8`` (least significant first) of byte ``p // 8`` belongs to flat index ``p`` of the weight as it
lies in memory (row-major). The last byte is padded with zeros. A mask of a 4096 x 4096 layer is 2 MB; the
positions themselves, as int32 at rho = 0.1, would be 6.7 MB and are therefore derived, never stored.
"""

from __future__ import annotations

import torch

_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)
# Bytes unpacked at a time: bounds the temporary to 8 MB of booleans and 64 MB of int64 positions.
_CHUNK_BYTES = 1 << 20


def packed_size(numel: int) -> int:
    """Bytes of the packed mask of ``numel`` weights."""
    return (numel + 7) // 8


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean mask of any shape ``[...]`` into uint8 ``[ceil(numel / 8)]``."""
    flat = mask.reshape(-1)
    padded = torch.zeros(packed_size(flat.numel()) * 8, dtype=torch.uint8, device=mask.device)
    padded[: flat.numel()] = flat
    bits = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * bits).sum(dim=1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Unpack uint8 ``[ceil(numel / 8)]`` into a boolean mask ``[numel]``."""
    bits = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & bits).ne(0).view(-1)[:numel]


def concatenate(masks: list[torch.Tensor], numel: int) -> torch.Tensor:
    """One packed mask of several, of ``numel`` weights each, one after another."""
    if numel % 8 == 0:
        return torch.cat(masks)
    return pack(torch.cat([unpack(mask, numel) for mask in masks]))


def positions(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Ascending flat indices ``[k]`` of the set bits: int32, or int64 where the weight needs it.

    Raises:
        ValueError: if a padding bit past ``numel`` is set or the size does not fit (a corrupted mask).
    """
    if packed.numel() != packed_size(numel):
        raise ValueError(f"a mask of {numel} weights has {packed_size(numel)} bytes, got {packed.numel()}")
    dtype = torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64
    parts = []
    for start in range(0, packed.numel(), _CHUNK_BYTES):
        chunk = packed[start : start + _CHUNK_BYTES]
        parts.append((unpack(chunk, chunk.numel() * 8).nonzero().view(-1) + start * 8).to(dtype))
    found = torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=packed.device)
    if found.numel() and int(found[-1]) >= numel:
        raise ValueError(f"a mask bit is set at {int(found[-1])}, past the last of {numel} weights")
    return found


def has_padding_set(packed: torch.Tensor, numel: int) -> bool:
    """Whether a bit past ``numel`` is set: the mask is damaged."""
    return bool(numel % 8) and int(packed[-1]) >> (numel % 8) != 0


def count(packed: torch.Tensor) -> int:
    """Number of set bits."""
    table = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int64)
    return int(table @ torch.bincount(packed, minlength=256).cpu())
