from __future__ import annotations

import pytest
import torch

from dowser_peft import column_ids


def test_ids_of_an_adapter_that_waits() -> None:
    waiting = column_ids.none_yet(3)
    assert waiting.tolist() == [-1, -1, -1] and waiting.dtype == torch.int32
    assert column_ids.are_none(waiting) and not column_ids.are_none(torch.tensor([-1, 2]))


@pytest.mark.parametrize(
    ("ids", "in_features", "message"),
    [
        ([0, 3, 9], 10, None),
        ([9], None, None),
        ([], 10, "are none at all"),
        ([0, 3, 10], 10, "include 10, which is not one of 10 inputs"),
        ([-1, 3], 10, "include -1, which is not one of 10 inputs"),
        ([-2, 3], None, "include -2, which is not one of its inputs"),
        ([3, 0], 10, "are not in ascending order, each once"),
        ([3, 3], 10, "are not in ascending order, each once"),
    ],
)
def test_defects(ids: list[int], in_features: int | None, message: str | None) -> None:
    assert column_ids.defect(torch.tensor(ids, dtype=torch.int32), in_features) == message
