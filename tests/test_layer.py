"""One layer with its adapters: values, mask, forward, merge, unmerge."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dowser_peft import bitmask
from dowser_peft.layer import Linear
from dowser_peft.sparse_delta import scatter_delta

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_mask(numel: int, k: int, seed: int = 0) -> torch.Tensor:
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:k]] = True
    return bitmask.pack(mask)


def make_layer(
    dtype: torch.dtype = torch.float32, conv1d: bool = False, bias: bool = True, adapters: int = 1
) -> Linear:
    """10 -> 12 features, adapters a, b, c with 30 % of the weights each, all active, random values."""
    base = Conv1D(12, 10) if conv1d else nn.Linear(10, 12, bias=bias)
    nn.init.normal_(base.weight)
    base = base.to(dtype).requires_grad_(False)
    layer = Linear(base, "a", 0.3, random_mask(120, 36), init_weights=False)
    for index, name in enumerate("bc"[: adapters - 1], start=1):
        layer.update_layer(name, 0.3, random_mask(120, 36, seed=index), init_weights=False)
    for name in layer.dowser_values:
        layer.dowser_values[name] = nn.Parameter(torch.randn(36))
    layer.set_adapter(list("abc"[:adapters]))
    return layer


def test_starts_as_the_base_layer() -> None:
    base = nn.Linear(10, 12)
    layer = Linear(base, "a", 0.1, random_mask(120, 12))
    x = torch.randn(4, 10)
    assert torch.equal(layer(x), base(x))
    assert layer.dowser_values["a"].shape == (12,) and layer.dowser_values["a"].dtype == torch.float32
    assert layer.dowser_mask["a"].dtype == torch.uint8 and layer.dowser_mask["a"].shape == (15,)


def test_init_weights_false_is_not_the_identity() -> None:
    base = nn.Linear(10, 12)
    layer = Linear(base, "a", 0.1, random_mask(120, 12), init_weights=False)
    x = torch.randn(4, 10)
    assert not torch.allclose(layer(x), base(x))


@pytest.mark.parametrize("conv1d", [False, True])
def test_delta_weight(conv1d: bool) -> None:
    layer = make_layer(conv1d=conv1d)
    delta = layer.get_delta_weight("a")
    assert delta.shape == layer.get_base_layer().weight.shape
    mask = bitmask.unpack(layer.dowser_mask["a"], 120)
    assert torch.equal(delta.view(-1)[mask], layer.dowser_values["a"])
    assert not delta.view(-1)[~mask].any()
    x = torch.randn(4, 10)
    effective = layer.get_base_layer().weight + delta
    expected = x @ (effective if conv1d else effective.T) + layer.get_base_layer().bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("adapters", [1, 3])
def test_merged_equals_unmerged_and_unmerge_restores_bit_for_bit(
    dtype: torch.dtype, conv1d: bool, adapters: int
) -> None:
    layer = make_layer(dtype, conv1d, adapters=adapters)
    weight = layer.get_base_layer().weight
    original, storage = weight.clone(), weight.data_ptr()
    x = torch.randn(3, 5, 10, dtype=dtype)
    unmerged = layer(x)
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == list("abc"[:adapters])
    assert torch.equal(layer(x), unmerged)
    assert not torch.equal(weight, original)
    layer.unmerge()
    assert torch.equal(weight, original) and weight.data_ptr() == storage
    assert torch.equal(layer(x), unmerged)


def test_merge_one_by_one_and_unmerge_through_disable() -> None:
    layer = make_layer(torch.bfloat16, adapters=3)
    original = layer.get_base_layer().weight.clone()
    x = torch.randn(3, 10, dtype=torch.bfloat16)
    base_result = layer.get_base_layer()(x)
    unmerged = layer(x)
    for name in "abc":
        layer.merge(adapter_names=[name])
    assert torch.equal(layer(x), unmerged)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base_result)
    assert torch.equal(layer.get_base_layer().weight, original)


def test_merging_twice_does_nothing() -> None:
    layer = make_layer()
    layer.merge()
    once = layer.get_base_layer().weight.clone()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert torch.equal(layer.get_base_layer().weight, once)


def test_unmerge_without_merge_warns() -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        make_layer().unmerge()


def test_merge_of_a_non_contiguous_weight() -> None:
    layer = make_layer()
    base = layer.get_base_layer()
    base.weight = nn.Parameter(base.weight.data.T.contiguous().T, requires_grad=False)
    original, x = base.weight.clone(), torch.randn(3, 10)
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)
    layer.unmerge()
    assert torch.equal(base.weight, original)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_nan_and_leaves_the_base_untouched(bad: float) -> None:
    layer = make_layer()
    original = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.dowser_values["a"][5] = bad
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter a"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, original)
    assert not layer.merged


def test_several_active_adapters_add_up() -> None:
    layer = make_layer(adapters=3)
    weight = layer.get_base_layer().weight
    names = "abc"
    where = [layer.positions(name) for name in names]
    effective = scatter_delta(weight, where, [layer.dowser_values[name] for name in names])
    delta = sum(layer.get_delta_weight(name) for name in names)
    torch.testing.assert_close(effective, weight + delta)
    x = torch.randn(2, 10)
    torch.testing.assert_close(layer(x), x @ effective.T + layer.get_base_layer().bias)


def test_only_active_adapters_compute_and_train() -> None:
    layer = make_layer(adapters=2)
    layer.set_adapter("b")
    x = torch.randn(2, 10)
    expected = x @ (layer.get_base_layer().weight + layer.get_delta_weight("b")).T + layer.get_base_layer().bias
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.dowser_values["a"].grad is None and layer.dowser_values["b"].grad is not None
    assert layer.get_base_layer().weight.grad is None


def test_delete_adapter() -> None:
    layer = make_layer(adapters=2)
    layer.set_adapter("a")
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        layer.delete_adapter("a")
    assert list(layer.dowser_values) == ["b"] and list(layer.dowser_mask) == ["b"]
    layer.delete_adapter("b")
    x = torch.randn(2, 10)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_bias_can_train() -> None:
    layer = make_layer()
    layer.get_base_layer().bias.requires_grad_()
    layer(torch.ones(4, 10)).sum().backward()
    assert torch.equal(layer.get_base_layer().bias.grad, torch.full((12,), 4.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_stay_float32_over_a_half_precision_base(dtype: torch.dtype) -> None:
    """Updates far below the spacing of the weight's dtype accumulate instead of vanishing."""
    layer = Linear(nn.Linear(10, 12, bias=False).to(dtype).requires_grad_(False), "a", 0.3, random_mask(120, 36))
    layer.dowser_values["a"] = nn.Parameter(layer.dowser_values["a"].data.float())
    with torch.no_grad():
        layer.get_base_layer().weight.fill_(1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)
    x = torch.ones(1, 10, dtype=dtype)
    before = layer(x)
    for _ in range(100):
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.dowser_values["a"].data, torch.full((36,), -1e-3), rtol=1e-3, atol=0)
    with torch.no_grad():
        for _ in range(20):
            layer.dowser_values["a"] -= 1e-3
    assert (layer(x) <= before).all() and (layer(x) < before).any()


@pytest.mark.parametrize("conv1d", [False, True])
def test_autocast_matches_the_merged_layer(conv1d: bool) -> None:
    layer = make_layer(conv1d=conv1d)
    x = torch.randn(3, 10, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = layer(x)
    assert unmerged.dtype == torch.bfloat16
    unmerged.float().sum().backward()
    assert layer.dowser_values["a"].grad.dtype == torch.float32 and x.grad.dtype == torch.float32
    layer.merge()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), unmerged)


def test_non_reentrant_and_reentrant_checkpointing() -> None:
    layer = make_layer()
    x = torch.randn(3, 10, requires_grad=True)
    layer(x).square().sum().backward()
    expected = layer.dowser_values["a"].grad.clone()
    for use_reentrant in (False, True):
        layer.zero_grad()
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.equal(layer.dowser_values["a"].grad, expected)


def test_positions_follow_the_mask() -> None:
    """The mask is the only truth: positions are derived again when it is written in place or replaced."""
    layer = make_layer()
    first = layer.positions("a")
    assert layer.positions("a") is first
    layer.dowser_mask["a"].copy_(random_mask(120, 36, seed=7))
    expected = bitmask.positions(random_mask(120, 36, seed=7), 120)
    assert torch.equal(layer.positions("a"), expected)
    layer.load_state_dict({"dowser_mask.a": random_mask(120, 36, seed=8)}, strict=False, assign=True)
    assert torch.equal(layer.positions("a"), bitmask.positions(random_mask(120, 36, seed=8), 120))


def test_positions_do_not_trust_a_reused_address() -> None:
    layer = make_layer()
    for seed in range(20):
        layer.dowser_mask["a"] = torch.empty(0, dtype=torch.uint8)  # frees the old mask: its address is used again
        layer.dowser_mask["a"] = random_mask(120, 36, seed=seed)
        assert torch.equal(layer.positions("a"), bitmask.positions(random_mask(120, 36, seed=seed), 120))


def test_pickles(tmp_path) -> None:
    layer = make_layer()
    x = torch.randn(2, 10)
    expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), expected)


def test_a_mask_of_another_adapter_is_an_error() -> None:
    layer = make_layer()
    layer.dowser_mask["a"].copy_(random_mask(120, 35))
    with pytest.raises(RuntimeError, match="the mask marks 35 weights but there are 36 values"):
        layer(torch.randn(1, 10))


def test_an_adapter_waiting_for_its_file_is_inert_and_refuses_to_train() -> None:
    base = nn.Linear(10, 12).requires_grad_(False)
    layer = Linear(base, "a", 0.3, mask=None, init_weights=False, inference_mode=True)
    x = torch.randn(2, 10)
    assert layer.is_waiting("a")
    assert torch.equal(layer(x), base(x))
    layer.dowser_values["a"].requires_grad_()
    with pytest.raises(RuntimeError, match="its mask has not been loaded"):
        layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), base(x))


def test_deepcopy_shares_nothing() -> None:
    layer = make_layer()
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    with torch.no_grad():
        twin.dowser_values["a"].zero_()
    x = torch.randn(2, 10)
    assert torch.equal(twin(x), twin.get_base_layer()(x))
    assert layer.merged and not torch.equal(layer(x), twin(x))


def test_warns_once_about_hooks_on_the_base_layer() -> None:
    layer = make_layer()
    layer.get_base_layer().register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="has forward or backward hooks, which are bypassed"):
        layer(torch.randn(1, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(1, 10))


def test_only_the_input_is_kept_for_backward() -> None:
    """Against the plain layer with a trainable weight: the same tensors, and no effective weight."""
    layer = make_layer()
    x = torch.randn(7, 10, requires_grad=True)
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    known = {x.data_ptr(), layer.get_base_layer().weight.data_ptr(), layer.dowser_values["a"].data_ptr()}
    assert set(saved) == known


def test_unmerge_restores_where_the_merge_wrote_whatever_the_mask_is_now() -> None:
    layer = make_layer()
    original = layer.get_base_layer().weight.clone()
    layer.merge()
    layer.dowser_mask["a"].copy_(random_mask(120, 36, seed=9))
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original)


def test_merging_a_waiting_adapter_does_nothing() -> None:
    layer = Linear(nn.Linear(10, 12), "a", 0.3, mask=None, init_weights=False, inference_mode=True)
    original = layer.get_base_layer().weight.clone()
    layer.merge()
    assert torch.equal(layer.get_base_layer().weight, original) and not layer.merged


def test_float64_under_autocast_stays_float64() -> None:
    layer = make_layer(torch.float64)
    x = torch.randn(2, 10, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == layer.get_base_layer()(x).dtype == torch.float64
