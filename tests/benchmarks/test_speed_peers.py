"""The peers of the speed benchmarks train what they say, and masked full fine-tuning is Dowser's trajectory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.speed import peers
from benchmarks.speed.shapes import SHAPES, Shape, build_llama
from dowser_peft import bitmask
from dowser_peft.scoring import num_trainable
from dowser_peft.targets import default_targets
from dowser_peft.tuner_layer import DowserLayer

CPU = torch.device("cpu")
SMALL = Shape(64, 160, 2, 2, 96)
RHO = 0.1
IDS = torch.arange(24).reshape(2, 12) % SMALL.vocabulary


def base(dtype: torch.dtype = torch.float32, nf4: bool = False) -> nn.Module:
    return build_llama(SMALL, CPU, dtype, nf4=nf4)


def exact_count(model: nn.Module) -> int:
    return sum(num_trainable(weight.numel(), RHO) for weight in peers.target_weights(model).values())


def test_the_shapes_have_the_weights_that_their_names_say() -> None:
    for name, millions in {"10m": 10, "33m": 33, "100m": 100, "200m": 200, "1b": 1000, "3b": 3000, "7b": 6500}.items():
        shape = SHAPES[name]
        weights = shape.layers * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)
        assert weights / 1e6 == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", peers.METHODS)
def test_every_method_learns(method: str, dtype: torch.dtype) -> None:
    trained = peers.trainable(method, base(dtype), RHO)
    losses = [trained.step(IDS).item() for _ in range(8)]
    assert all(parameter.grad is None for parameter in trained.model.parameters())
    if peers.METHODS[method].optimise:
        assert losses[-1] < losses[0]
    else:
        assert losses[-1] == losses[0]


@pytest.mark.parametrize("method", [name for name in peers.METHODS if name in peers.ON_4BIT])
def test_methods_for_a_4bit_base_learn_there(method: str) -> None:
    trained = peers.trainable(method, base(nf4=True), RHO)
    losses = [trained.step(IDS).item() for _ in range(8)]
    assert losses[-1] < losses[0]


def test_trained_counts() -> None:
    model = base()
    exact, layers = exact_count(model), len(default_targets(model))
    counts = {name: peers.trainable(name, base(), RHO).trained_parameters for name in peers.METHODS}
    dense = sum(weight.numel() for weight in peers.target_weights(model).values())
    assert counts["Dowser"] == exact
    assert exact - layers <= counts["PEFT Super-Tuning"] <= exact  # it rounds down
    for name in ("dense floor", "full fine-tuning", "masked full fine-tuning"):
        assert counts[name] == dense
    # Rank methods count in steps of one rank: the nearest is at most half a step away.
    shapes = [weight.shape for weight in peers.target_weights(model).values()]
    step, ranks = sum(sum(shape) for shape in shapes), peers.same_count_rank(model, RHO)
    for name in ("PEFT SHiRA", "LoRA, same count"):
        assert counts[name] == ranks * step and abs(counts[name] - exact) <= step / 2
    assert counts["PEFT OSF"] == ranks * (step + layers)  # and the singular values
    assert counts["LoRA r=64"] == 64 * step


def test_a_count_of_ten_percent_is_met_closely_at_real_sizes() -> None:
    for shape in (SHAPES["33m"], SHAPES["7b"]):
        with torch.device("meta"):
            model = build_llama(shape, torch.device("meta"), torch.bfloat16, layers=1)
        step = sum(sum(weight.shape) for weight in peers.target_weights(model).values())
        assert abs(peers.same_count_rank(model, RHO) * step / exact_count(model) - 1) < 0.02


def test_masked_full_fine_tuning_takes_the_path_of_dowser() -> None:
    """Same masks, AdamW without weight decay: after ten steps the same weights, up to rounding."""
    start = {name: weight.detach().clone() for name, weight in peers.target_weights(base()).items()}
    sparse = peers.trainable("Dowser", base(), RHO)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in sparse.model.named_modules()
        if isinstance(module, DowserLayer)
    }
    masks = {
        name: bitmask.unpack(layer.dowser_mask["default"], layer.numel).view_as(start[name])
        for name, layer in layers.items()
    }
    dense = peers.Trainable(peers.masked_full_fine_tuning(base(), RHO, masks))
    for _ in range(10):
        torch.testing.assert_close(dense.step(IDS), sparse.step(IDS), rtol=1e-5, atol=0)

    trained = peers.target_weights(dense.model)
    assert trained.keys() == layers.keys() == start.keys()
    for name, weight in trained.items():
        mask, moved = masks[name], weight.detach() - start[name]
        assert int(mask.sum()) == num_trainable(weight.numel(), RHO)
        assert torch.equal(moved[~mask], torch.zeros_like(moved[~mask]))  # what is masked stays as it was, exactly
        delta = layers[name].get_delta_weight("default").detach()
        assert float(moved[mask].abs().median()) > 1e-3  # ten steps at a learning rate of 1e-3
        # Adam divides by the root of the second moment: entries of tiny gradients carry the rounding of the products.
        torch.testing.assert_close(start[name] + delta, weight.detach(), rtol=0, atol=2e-5)


def test_its_own_masks_are_those_of_the_smallest_weights() -> None:
    masks = peers.smallest_weights(base(), RHO)
    for name, weight in peers.target_weights(base()).items():
        size = num_trainable(weight.numel(), RHO)
        assert int(masks[name].sum()) == size
        assert weight[masks[name]].abs().max() <= weight[~masks[name]].abs().min()


def test_master_weights_keep_updates_that_bfloat16_would_lose() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = peers.MasterAdamW([weight], lr=1e-4)  # below half a bfloat16 step at 1
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert weight.grad is None
    torch.testing.assert_close(weight.detach().float(), torch.full((4,), 0.99), rtol=0, atol=4e-3)


def test_a_sharing_copy_shares_all_but_what_trains() -> None:
    model = base()
    copied, own = peers.sharing_copy(model), peers.sharing_copy(model, own_weights=True)
    targets = {f"{name}.weight" for name in default_targets(model)}
    for name, parameter in model.named_parameters():
        assert copied.get_parameter(name).data_ptr() == parameter.data_ptr()
        assert (own.get_parameter(name).data_ptr() == parameter.data_ptr()) == (name not in targets)
    peers.trainable("full fine-tuning", own, RHO).step(IDS)
    assert all(not parameter.requires_grad for parameter in model.parameters())
    for name in targets:
        assert torch.equal(model.get_parameter(name), base().get_parameter(name))
