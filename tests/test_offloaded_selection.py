"""Masks of a model that does not fit in memory: its weights are read one layer at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload

from dowser_peft import DowserConfig
from dowser_peft import importance as importance_module
from dowser_peft.importance import select_masks
from dowser_peft.targets import default_targets
from tests.models import tiny_llama


@pytest.mark.parametrize("granularity", ["element", "column"])
def test_offloaded_weights_are_read_one_at_a_time(
    granularity: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    config = DowserConfig(importance="magnitude", granularity=granularity)
    expected = select_masks(model, config, default_targets(model))
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    read: list[weakref.ref[torch.Tensor]] = []

    def watched(weight: torch.Tensor, *args: Any) -> torch.Tensor:
        assert sum(module.weight.device.type != "meta" for module in linears) == 1
        assert not any(earlier() is not None for earlier in read)
        read.append(weakref.ref(weight))
        return original(weight, *args)

    name = "bottom_rho_mask" if granularity == "element" else "bottom_rho_columns"
    original = getattr(importance_module, name)
    monkeypatch.setattr(importance_module, name, watched)
    masks = select_masks(model, config, default_targets(model))
    assert len(read) == len(masks) == 14
    assert all(torch.equal(masks[module], expected[module]) for module in masks)
