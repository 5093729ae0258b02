"""One layer with adapters on input columns: values, ids, forward, merge, unmerge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dowser_peft.column_layer import ColumnLinear
from tests.numerics import TOLERANCE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_columns(k: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:k].sort().values.int()


def make_layer(
    dtype: torch.dtype = torch.float32, conv1d: bool = False, bias: bool = True, adapters: int = 1
) -> ColumnLinear:
    """10 -> 12 features, adapters a, b, c with 3 columns each, all active, random values."""
    base = Conv1D(12, 10) if conv1d else nn.Linear(10, 12, bias=bias)
    nn.init.normal_(base.weight)
    base = base.to(dtype).requires_grad_(False)
    layer = ColumnLinear(base, "a", 0.3, random_columns())
    for index, name in enumerate("bc"[: adapters - 1], start=1):
        layer.update_layer(name, 0.3, random_columns(seed=index), init_weights=True)
    for name in layer.dowser_values:
        layer.dowser_values[name] = nn.Parameter(torch.randn(12, 3))
    layer.set_adapter(list("abc"[:adapters]))
    return layer


def matrix(layer: ColumnLinear) -> torch.Tensor:
    """The base weight as [out, in]."""
    weight = layer.get_base_layer().weight
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


def test_starts_as_the_base_layer() -> None:
    base = nn.Linear(10, 12)
    layer = ColumnLinear(base, "a", 0.25, random_columns(2))
    x = torch.randn(4, 10)
    assert torch.equal(layer(x), base(x))
    assert layer.dowser_values["a"].shape == (12, 2) and layer.dowser_values["a"].dtype == torch.float32
    assert layer.dowser_columns["a"].dtype == torch.int32 and layer.dowser_columns["a"].shape == (2,)
    assert repr(layer).startswith("dowser.ColumnLinear(")


def test_init_weights_false_is_not_the_identity() -> None:
    base = nn.Linear(10, 12)
    layer = ColumnLinear(base, "a", 0.3, random_columns(), init_weights=False)
    x = torch.randn(4, 10)
    assert not torch.allclose(layer(x), base(x))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("adapters", [1, 3])
def test_equals_the_dense_layer(conv1d: bool, adapters: int) -> None:
    layer = make_layer(conv1d=conv1d, adapters=adapters)
    weight = matrix(layer).clone()
    for name in "abc"[:adapters]:
        delta = layer.get_delta_weight(name)
        assert delta.shape == layer.get_base_layer().weight.shape
        dense = torch.zeros(12, 10)
        for position, column in enumerate(layer.dowser_columns[name].tolist()):
            dense[:, column] = layer.dowser_values[name][:, position]
        assert torch.equal(delta.T if conv1d else delta, dense)
        weight += dense
    x = torch.randn(3, 5, 10)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.get_base_layer().bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("adapters", [1, 3])
def test_merge_agrees_within_rounding_and_unmerge_restores_bit_for_bit(
    dtype: torch.dtype, conv1d: bool, adapters: int
) -> None:
    layer = make_layer(dtype, conv1d, adapters=adapters)
    weight = layer.get_base_layer().weight
    original, storage, base = weight.clone(), weight.data_ptr(), matrix(layer).detach().clone()
    x = torch.randn(3, 5, 10, dtype=dtype)
    unmerged = layer(x)
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == list("abc"[:adapters])
    for name in "abc"[:adapters]:  # one after the other, each sum rounded once
        columns = layer.dowser_columns[name].long()
        base[:, columns] = (base[:, columns].float() + layer.dowser_values[name].detach()).to(dtype)
    assert torch.equal(matrix(layer), base)
    scale = float(x.abs().max() * base.abs().max()) * 10
    assert float((layer(x) - unmerged).detach().abs().max()) <= TOLERANCE[dtype] * scale
    layer.unmerge()
    assert torch.equal(weight, original) and weight.data_ptr() == storage
    assert torch.equal(layer(x), unmerged)


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


def test_unmerge_restores_where_the_merge_wrote_whatever_the_ids_are_now() -> None:
    layer = make_layer()
    original = layer.get_base_layer().weight.clone()
    layer.merge()
    layer.dowser_columns["a"].copy_(random_columns(seed=9))
    layer.unmerge()
    assert torch.equal(layer.get_base_layer().weight, original)


def test_disabling_unmerges() -> None:
    layer = make_layer(adapters=2)
    x = torch.randn(3, 10)
    expected = layer.get_base_layer()(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected) and not layer.merged


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_nan_and_leaves_the_base_untouched(bad: float) -> None:
    layer = make_layer()
    original = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.dowser_values["a"][5, 1] = bad
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter a"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, original) and not layer.merged


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
    assert list(layer.dowser_values) == ["b"] and list(layer.dowser_columns) == ["b"]
    layer.delete_adapter("b")
    x = torch.randn(2, 10)
    assert torch.equal(layer(x), layer.get_base_layer()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_stay_float32_over_a_half_precision_base(dtype: torch.dtype) -> None:
    """Updates far below the spacing of the weight's dtype accumulate instead of vanishing."""
    layer = ColumnLinear(nn.Linear(10, 12, bias=False).to(dtype).requires_grad_(False), "a", 0.3, random_columns())
    layer.dowser_values["a"] = nn.Parameter(layer.dowser_values["a"].data.float())
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)
    x = torch.ones(1, 10, dtype=dtype)
    for _ in range(100):
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer.dowser_values["a"].data, torch.full((12, 3), -1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("conv1d", [False, True])
def test_autocast(conv1d: bool) -> None:
    layer = make_layer(conv1d=conv1d)
    x = torch.randn(3, 10, requires_grad=True)
    expected = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=5e-2)
    y.float().sum().backward()
    assert layer.dowser_values["a"].grad.dtype == torch.float32 and x.grad.dtype == torch.float32


def test_float64_under_autocast_stays_float64() -> None:
    layer = make_layer(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 10, dtype=torch.float64)).dtype == torch.float64


def test_checkpointing() -> None:
    layer = make_layer()
    x = torch.randn(3, 10, requires_grad=True)
    layer(x).square().sum().backward()
    expected = layer.dowser_values["a"].grad.clone()
    for use_reentrant in (False, True):
        layer.zero_grad()
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.equal(layer.dowser_values["a"].grad, expected)


@pytest.mark.parametrize("conv1d", [False, True])
def test_compiles_without_a_graph_break(conv1d: bool) -> None:
    layer = make_layer(conv1d=conv1d, adapters=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 10)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(theirs).square().sum().backward()
    expected = layer.dowser_values["a"].grad.clone()
    layer.zero_grad()
    y = compiled(ours)
    torch.testing.assert_close(y, layer(x))
    y.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer.dowser_values["a"].grad, expected)


def test_hooks_on_the_base_layer_run() -> None:
    layer = make_layer()
    seen: list[Any] = []
    layer.get_base_layer().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    layer.get_base_layer().register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0].shape))
    layer(torch.randn(4, 10, requires_grad=True)).sum().backward()
    assert seen == [(4, 10), (4, 10)]


class Opaque(nn.Module):
    """Stands for GPTQ, AWQ or fp8: maps features, its weight can neither be read nor written."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 10, 12
        self.register_buffer("qweight", torch.randint(-9, 9, (10, 12), dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.to(x.dtype) / 9


def test_a_base_that_cannot_be_dequantised_trains_but_does_not_merge() -> None:
    layer = ColumnLinear(Opaque(), "a", 0.3, random_columns())
    x = torch.randn(4, 10, requires_grad=True)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    layer(x).sum().backward()
    expected = x.detach()[:, layer.dowser_columns["a"].long()].sum(0).expand(12, 3)
    torch.testing.assert_close(layer.dowser_values["a"].grad, expected)
    with pytest.raises(ValueError, match="cannot merge into a Opaque: its weight is not a matrix of ordinary floats"):
        layer.merge()
    assert not layer.merged


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


def test_a_layer_that_computes_more_than_its_weight_says_is_not_merged() -> None:
    """Half of a merged delta would be lost."""
    layer = ColumnLinear(Scaled(10, 12), "a", 0.3, random_columns(), init_weights=False)
    with pytest.raises(ValueError, match="cannot merge into a Scaled"):
        layer.merge()


def test_a_waiting_adapter_is_inert_and_refuses_to_train() -> None:
    base = nn.Linear(10, 12).requires_grad_(False)
    layer = ColumnLinear(base, "a", 0.3, None, init_weights=False, inference_mode=True)
    x, original = torch.randn(2, 10), base.weight.clone()
    assert layer.is_waiting("a") and not layer.get_delta_weight("a").any()
    assert torch.equal(layer(x), base(x))
    layer.merge()
    assert torch.equal(base.weight, original) and not layer.merged
    layer.dowser_values["a"].requires_grad_()
    with pytest.raises(RuntimeError, match="its columns have not been loaded"):
        layer(x)
    layer.dowser_columns["a"].copy_(random_columns())
    assert not layer.is_waiting("a") and not torch.equal(layer(x), base(x))


def test_ids_of_another_layer_are_an_error() -> None:
    layer = make_layer()
    layer(torch.randn(1, 10))
    layer.dowser_columns["a"].copy_(torch.tensor([1, 2, 10]))
    with pytest.raises(RuntimeError, match="its columns include 10, which is not one of 10 inputs"):
        layer(torch.randn(1, 10))


def test_ids_are_looked_at_once() -> None:
    """On a GPU each look would wait for it."""
    layer = make_layer()
    layer(torch.randn(1, 10))
    looked: list[Any] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            looked.append(func) if func is torch.ops.aten._local_scalar_dense.default else None
            return func(*args, **(kwargs or {}))

    with Watch():
        layer(torch.randn(1, 10))
    assert not looked
    with torch.inference_mode():
        layer.dowser_columns["a"] = random_columns(seed=3)  # an inference tensor has no version
        layer(torch.randn(1, 10))


def test_pickle_and_deepcopy(tmp_path: Path) -> None:
    layer = make_layer()
    x = torch.randn(2, 10)
    expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    assert torch.equal(torch.load(tmp_path / "layer.pt", weights_only=False)(x), expected)
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    with torch.no_grad():
        twin.dowser_values["a"].zero_()
    assert torch.equal(twin(x), twin.get_base_layer()(x))
    assert layer.merged and not torch.equal(layer(x), twin(x))


@pytest.mark.parametrize(("in_features", "k"), [(1, 1), (7, 7), (1023, 102)])
@pytest.mark.parametrize("batch_shape", [(3,), (0,), (2, 0, 4), (2, 3, 4)])
def test_odd_shapes(in_features: int, k: int, batch_shape: tuple[int, ...]) -> None:
    columns = torch.randperm(in_features)[:k].sort().values.int()
    layer = ColumnLinear(nn.Linear(in_features, 5), "a", k / in_features, columns, init_weights=False)
    x = torch.randn(*batch_shape, in_features)
    weight = layer.get_base_layer().weight + layer.get_delta_weight("a")
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.get_base_layer().bias))
