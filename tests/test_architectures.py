"""Every architecture end to end: probe, adapt, train with images or sounds where there are any, save, load, merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from dowser_peft import DowserConfig, bitmask, probe
from dowser_peft.fused_experts import expert_name
from tests.architectures import ARCHITECTURES, Architecture, Inputs
from tests.models import NUM_EXPERTS
from tests.test_model import dowser_layers

QUICK: dict[str, Any] = {"num_prompts": 2, "num_probes": 1, "prompt_length": 6}
RHO = 0.1


def outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def train_one_step(model: nn.Module, inputs: Inputs) -> float:
    """One step of AdamW; the gradients are left in place."""
    model.train()
    loss = model(**inputs).loss
    loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    return loss.item()


@pytest.mark.filterwarnings("ignore:no prompt reached", "ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_end_to_end(row: Architecture, tmp_path: Path) -> None:
    base, inputs = row.build(), row.inputs()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    untrained = outputs(base, inputs)
    for name in {"pixel_values", "input_features"} & inputs.keys():  # the image or sound is seen
        assert not torch.equal(outputs(base, inputs | {name: -inputs[name]}), untrained)

    statistics = probe(base, **QUICK, progress=False)
    experts = {expert_name(name, index) for name in row.parameters for index in range(NUM_EXPERTS)}
    assert set(statistics.module_names) == row.targets | experts
    model = get_peft_model(base, DowserConfig(rho=RHO, importance=statistics))
    layers = dowser_layers(model.get_base_model())
    assert set(layers) == row.targets | row.parameters
    # Only the values train: vision tower, projector, embeddings and head are frozen.
    values = {f"base_model.model.{name}.dowser_values.default" for name in layers}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == values
    assert torch.equal(outputs(model, inputs), untrained)

    assert math.isfinite(train_one_step(model, inputs))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == values
    assert all(bool(gradient.any()) for gradient in gradients.values())
    trained = outputs(model, inputs)
    assert not torch.equal(trained, untrained)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(row.build(), tmp_path)
    assert torch.equal(outputs(loaded, inputs), trained)

    masks = {name: bitmask.unpack(layer.dowser_mask["default"], layer.numel) for name, layer in layers.items()}
    merged = model.merge_and_unload()
    assert torch.equal(outputs(merged, inputs), trained)
    after = merged.state_dict()
    assert after.keys() == before.keys()
    for key, value in after.items():
        changed = (value != before[key]).view(-1)
        name, _, kind = key.rpartition(".")
        name = key if key in row.parameters else name
        if key not in row.parameters and (name not in row.targets or kind != "weight"):
            assert not bool(changed.any()), key
            continue
        assert bool(changed.any()) and not bool(changed[~masks[name]].any()), key
