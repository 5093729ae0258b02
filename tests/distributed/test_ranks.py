"""What ranks exchange, and that they end alike."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dowser_peft.ranks import Ranks, meet
from tests.distributed.launch import run_ranks


def exchange() -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    ranks = meet("test", {}, has_weights=rank != 1)
    tensors = {"mask": torch.tensor([1, 255], dtype=torch.uint8), "half": torch.ones(2, 3, dtype=torch.bfloat16)}
    found: dict[str, Any] = {
        "parts": [list(ranks.part(count)) for count in (0, 1, 2, 7)],
        "gathered": ranks.gather(rank),
        "shared": ranks.share(rank),
        "tensors": ranks.share_tensors(tensors if rank == 0 else {}),
        "sum": ranks.sum(torch.tensor([1.0, rank])).tolist(),
        "raised": [],
    }
    for error in (
        {},
        {2: KeyError("no")},
        {1: OSError("so"), 2: KeyError("no")},
        {0: ValueError("x"), 1: OSError("so")},
    ):
        try:
            with ranks.together(OSError, KeyError):
                if rank in error:
                    raise error[rank]
        except Exception as raised:
            found["raised"].append(f"{type(raised).__name__} {raised}")
    return found


def test_exchange() -> None:
    by_rank = run_ranks(exchange, size=3)
    for rank, found in enumerate(by_rank):
        assert found["gathered"] == [0, 1, 2]
        assert found["shared"] == 0
        assert found["sum"] == [3.0, 3.0]
        assert found["tensors"]["mask"].tolist() == [1, 255]
        assert torch.equal(found["tensors"]["half"], torch.ones(2, 3, dtype=torch.bfloat16))
        no, so, failed = found["raised"]  # nothing is raised the first time
        assert no.startswith("KeyError") and so.startswith("OSError")
        assert failed == "ValueError x" if rank == 0 else "RuntimeError rank 0 failed at this" in failed
    parts = [found["parts"] for found in by_rank]
    assert parts == [[[], [0], [0], [0, 1, 2, 3]], [[], [], [], []], [[], [], [1], [4, 5, 6]]]  # rank 1: no weights


def test_a_process_on_its_own() -> None:
    ranks, tensor = Ranks(), torch.ones(2)
    assert list(ranks.part(3)) == [0, 1, 2]
    assert ranks.gather(5) == [5] and ranks.share(5) == 5 and ranks.sum(tensor) is tensor
