"""Ids of the trained input columns of a layer: int32 ``[k]``, ascending, each once.

An adapter that waits for its file has the same number of entries, all -1.
"""

from __future__ import annotations

import torch

_NONE = -1


def none_yet(k: int) -> torch.Tensor:
    """The ids of an adapter that waits for its file: int32 ``[k]``."""
    return torch.full((k,), _NONE, dtype=torch.int32)


def are_none(columns: torch.Tensor) -> bool:
    """Whether these are the ids of an adapter that waits for its file."""
    return bool((columns == _NONE).all())


def defect(columns: torch.Tensor, in_features: int | None) -> str | None:
    """What is wrong with ids of the columns of a layer, to be read after "its columns"; None if nothing is.

    Args:
        columns: ``[k]``.
        in_features: how many columns the layer has; None if that is not known.
    """
    if columns.numel() == 0:
        return "are none at all"
    low, high = (int(end) for end in columns.aminmax())
    if low < 0 or (in_features is not None and high >= in_features):
        wrong = low if low < 0 else high
        return f"include {wrong}, which is not one of {in_features or 'its'} inputs"
    if bool((columns.diff() <= 0).any()):
        return "are not in ascending order, each once"
    return None
