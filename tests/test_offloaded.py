"""A base that lies on the disk, or is spread over devices: probed, trained, saved, loaded, merged, generated from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from dowser_peft import DowserConfig, bitmask, probe
from dowser_peft.column_layer import ColumnLinear
from dowser_peft.layer import Linear
from dowser_peft.probing.collect import _joined, _on_cpu
from tests.models import tiny_llama
from tests.test_model import IDS, QUICK, dowser_layers, train

GRANULARITIES = ["element", "column"]
CPU = torch.device("cpu")


def offloaded(where: str, folder: Path) -> nn.Module:
    model = tiny_llama()
    if where == "cpu":
        cpu_offload(model, execution_device=CPU)
    else:
        disk_offload(model, folder, execution_device=CPU)
    return model


def test_a_probe_keeps_no_weight_for_its_backward_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer's weights are read from the disk for the forward pass, and again for each backward pass."""
    brought: list[StorageWeakRef] = []
    kept: dict[str, list[int]] = {"forward": [], "backward": []}
    original = nn.Linear.forward

    def count(when: str) -> None:
        kept[when].append(sum(not storage.expired() for storage in brought))

    def watched(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        count("forward")
        y = original(self, x)
        brought.append(StorageWeakRef(self.weight.untyped_storage()))
        if y.requires_grad:
            y.register_hook(lambda gradient: count("backward"))
        return y

    expected = probe(tiny_llama(), **QUICK)
    monkeypatch.setattr(nn.Linear, "forward", watched)
    found = probe(offloaded("disk", tmp_path), **QUICK)
    assert set(kept["forward"]) == set(kept["backward"]) == {0}
    assert len(kept["backward"]) == QUICK["num_probes"] * (14 + 1 - 3)  # and the head; the graph starts after q, k, v
    assert found.activations.keys() == expected.activations.keys()
    assert all(torch.equal(found.activations[name], value) for name, value in expected.activations.items())
    assert all(torch.equal(found.sensitivities[name], value) for name, value in expected.sensitivities.items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_life_of_an_adapter(where: str, granularity: Any, tmp_path: Path) -> None:
    config = DowserConfig(**QUICK | {"granularity": granularity})
    model = get_peft_model(offloaded(where, tmp_path / "base"), config)
    reference = get_peft_model(tiny_llama(), DowserConfig(**QUICK | {"granularity": granularity}))
    assert train(model) == train(reference)
    expected = reference(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(input_ids=IDS, **options), reference.generate(input_ids=IDS, **options))

    model.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert torch.equal(plain(IDS).logits, expected)
    again = PeftModel.from_pretrained(offloaded(where, tmp_path / "other"), tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, expected)
    assert all(layer.get_base_layer().weight.device.type == "meta" for layer in dowser_layers(again).values())

    merged = reference.merge_and_unload()(IDS).logits
    assert torch.equal(again.merge_and_unload()(IDS).logits, merged)


# No GPU is needed to tell where tensors lie: fake ones have a device and no data.


def layer_on(device: str) -> nn.Linear:
    layer = nn.Linear(8, 8, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(8, 8, device=device), requires_grad=False)
    return layer


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_an_adapter_lies_where_its_layer_is(device: str) -> None:
    chosen = {Linear: bitmask.pack(torch.arange(64) < 16), ColumnLinear: torch.arange(2, dtype=torch.int32)}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for kind, where in chosen.items():
            layer = kind(layer_on(device), "first", 0.25, where)
            layer.update_layer("second", 0.25, where, init_weights=True)
            for name in ("first", "second"):
                assert str(layer.dowser_values[name].device) == str(layer.selections[name].device) == device


def test_statistics_of_several_devices_come_together() -> None:
    with FakeTensorMode():
        parts = [torch.empty(2, 4, device="cuda:0"), None, torch.empty(1, 4, device="cuda:1")]
        joined = _joined(parts, [2, 3, 1], (4,))
        assert (joined.shape, str(joined.device)) == ((6, 4), "cuda:0")
        found = _on_cpu([joined, torch.empty(5, 2, device="cuda:1"), torch.empty(3)])
        assert [(tuple(tensor.shape), tensor.device.type) for tensor in found] == [
            ((6, 4), "cpu"),
            ((5, 2), "cpu"),
            ((3,), "cpu"),
        ]
