"""Adapters on fused experts: effective weights in every implementation, gradients, merging, memory."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from dowser_peft import DowserConfig, bitmask, experts_layer
from dowser_peft.experts_layer import Experts, FusedExperts
from dowser_peft.fused_experts import fused_weights
from dowser_peft.scoring import num_trainable
from tests import models
from tests.test_model import IDS, dowser_layers, train

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
BUILDS = [models.tiny_mixtral, models.tiny_gpt_oss]
RANDOM: dict[str, Any] = {"importance": "random", "target_modules": [], "rho": 0.2}
ALL = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(build: Any = models.tiny_mixtral, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model whose experts have an adapter with random values."""
    settings = RANDOM | {"target_parameters": ALL, "init_weights": False} | options
    torch.manual_seed(1)
    return get_peft_model(build().to(dtype), DowserConfig(**settings)).eval()


def expert_layers(model: nn.Module) -> dict[str, FusedExperts]:
    return {name: layer for name, layer in dowser_layers(model).items() if isinstance(layer, FusedExperts)}


def dense(model: PeftModel, build: Any, *adapters: str) -> Any:
    """The plain model with the deltas of ``model`` in its parameters, put there bit by bit of the masks."""
    plain = build()
    for name, layer in expert_layers(model.get_base_model()).items():
        for adapter in layer.dowser_values.keys() & set(adapters):
            marked = bitmask.unpack(layer.dowser_mask[adapter], layer.numel)
            plain.get_parameter(name).data.view(-1)[marked] += layer.dowser_values[adapter].detach()
    return plain


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("build", BUILDS)
def test_computes_with_the_delta_in_every_implementation(build: Any, implementation: str) -> None:
    model = adapted(build)
    plain = dense(model, build, "default")
    model.get_base_model().set_experts_implementation(implementation)
    plain.set_experts_implementation(implementation)
    with torch.no_grad():
        untrained = build()(IDS).logits
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
        assert not torch.allclose(plain(IDS).logits, untrained, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("build", BUILDS)
def test_gradients_are_those_of_the_plain_parameter(build: Any, implementation: str) -> None:
    model = adapted(build)
    plain = dense(model, build, "default")
    for each in (model.get_base_model(), plain):
        each.set_experts_implementation(implementation)
        each(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in expert_layers(model.get_base_model()).items():
        marked = bitmask.unpack(layer.dowser_mask["default"], layer.numel)
        expected = plain.get_parameter(name).grad.reshape(-1)[marked]
        torch.testing.assert_close(layer.dowser_values["default"].grad, expected, rtol=1e-4, atol=1e-6)
        assert bool(expected.any())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", BUILDS)
def test_merged_output_is_the_unmerged_one_and_unmerging_restores(
    build: Any, dtype: torch.dtype, implementation: str
) -> None:
    model = adapted(build, dtype)
    model.get_base_model().set_experts_implementation(implementation)
    before = {name: weight.parameter.clone() for name, weight in fused_weights(model)}
    with torch.no_grad():
        expected = model(IDS).logits
        model.merge_adapter()
        assert all(layer.merged for layer in expert_layers(model).values())
        assert any(not torch.equal(weight.parameter, before[name]) for name, weight in fused_weights(model))
        assert torch.equal(model(IDS).logits, expected)
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, expected)
    assert all(torch.equal(weight.parameter, before[name]) for name, weight in fused_weights(model))
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(build()) and merged.state_dict().keys() == build().state_dict().keys()
    assert not any(isinstance(module, Experts | FusedExperts) for module in merged.modules())
    with torch.no_grad():
        assert torch.equal(merged(IDS).logits, expected)


def test_safe_merge_refuses_nan_and_leaves_the_base() -> None:
    model = adapted()
    before = {name: weight.parameter.clone() for name, weight in fused_weights(model)}
    layer = next(iter(expert_layers(model).values()))
    layer.dowser_values["default"].data[3] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert all(torch.equal(weight.parameter, before[name]) for name, weight in fused_weights(model))


def test_unload_restores_the_base() -> None:
    with torch.no_grad():
        expected = models.tiny_mixtral()(IDS).logits
        assert torch.equal(adapted().unload()(IDS).logits, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_training_moves_the_values_and_nothing_else(implementation: str) -> None:
    base = models.tiny_mixtral()
    base.set_experts_implementation(implementation)
    model = get_peft_model(base, DowserConfig(target_parameters=ALL, **RANDOM))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert any("gate.weight" in name for name in frozen)
    losses = train(model, steps=6)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        else:
            assert name.endswith("dowser_values.default") and bool(parameter.any())


def test_small_updates_add_up_over_a_bfloat16_base() -> None:
    model = adapted(dtype=torch.bfloat16)
    assert {layer.dowser_values["default"].dtype for layer in expert_layers(model).values()} == {torch.float32}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_effective_weight_is_kept_from_forward_to_backward(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    model.get_base_model().set_experts_implementation(implementation)
    built: list[weakref.ref[Any]] = []
    rebuilt: list[int] = []

    def watched(make: Any, note: Any) -> Any:
        def run(*args: Any) -> torch.Tensor:
            result = make(*args)
            note(result)
            return result

        return run

    assert len(expert_layers(model)) == 4
    first = watched(experts_layer.sparse_delta_weight, lambda w: built.append(weakref.ref(w.untyped_storage())))
    monkeypatch.setattr(experts_layer, "sparse_delta_weight", first)
    again = watched(experts_layer.scatter_delta, lambda w: rebuilt.append(w.numel()))
    monkeypatch.setattr(experts_layer, "scatter_delta", again)
    loss = model(input_ids=IDS, labels=IDS).loss
    assert len(built) == 4 and all(ref() is None for ref in built)
    loss.backward()
    # That of the first layer is not needed, for its input needs no gradient. batched_mm copies the weight of each
    # token's expert, and autograd keeps these copies instead.
    assert len(rebuilt) == (0 if implementation == "batched_mm" else 3)


def test_an_adapter_that_does_not_train_passes_gradients_on_and_is_not_kept() -> None:
    model, plain = adapted(), adapted()
    for each in (model, plain):
        each.get_base_model().set_experts_implementation("eager")
    for layer in expert_layers(model).values():
        layer.dowser_values["default"].requires_grad_(False)
    gradients = []
    for each in (model, plain):
        embeddings = each.get_input_embeddings()(IDS).detach().requires_grad_()
        each(inputs_embeds=embeddings, labels=IDS).loss.backward()
        gradients.append(embeddings.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = adapted()
        model.train()
        if checkpointed:
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_checkpointing_of_experts_alone_keeps_nothing() -> None:
    """Inside the hooks of a checkpoint those that rebuild stand back: only its own are active."""
    experts = adapted().get_base_model().model.layers[0].mlp.experts
    x = torch.randn(6, models.HIDDEN, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 3]] * 2), torch.full((6, 2), 0.5)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = checkpoint(experts, x, index, weights, use_reentrant=False)
    assert sum(tensor.numel() for tensor in kept) <= x.numel() + index.numel() + weights.numel()
    y.sum().backward()
    expected = torch.autograd.grad(experts(x, index, weights).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_values_changed_between_forward_and_backward_are_noticed() -> None:
    model = adapted()
    loss = model(input_ids=IDS, labels=IDS).loss
    with torch.no_grad():
        for layer in expert_layers(model).values():
            layer.dowser_values["default"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice_through_one_graph() -> None:
    model = adapted()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()
    for gradient, parameter in zip(once, (p for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_autocast() -> None:
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    reference = adapted()
    reference(input_ids=IDS, labels=IDS).loss.backward()
    for one, other in zip(expert_layers(model).values(), expert_layers(reference).values(), strict=True):
        found, expected = one.dowser_values["default"].grad, other.dowser_values["default"].grad
        assert found.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.99


def test_sizes() -> None:
    layer = expert_layers(adapted(rho=0.1))["base_model.model.model.layers.0.mlp.experts.gate_up_proj"]
    each = num_trainable(48 * 16, 0.1)
    assert layer.dowser_values["default"].shape == (4 * each,)
    assert layer.dowser_mask["default"].shape == (4 * 48 * 16 // 8,)
    marked = bitmask.unpack(layer.dowser_mask["default"], layer.numel).view(4, -1)
    assert marked.sum(1).tolist() == [each] * 4
    delta = layer.get_delta_weight("default")
    assert delta.shape == (4, 48, 16) and torch.equal(delta != 0, marked.view(4, 48, 16))


def test_experts_whose_masks_do_not_fill_bytes() -> None:
    """5 x 3 weights of each expert: one packed buffer all the same."""
    masks = [torch.rand(15) < 0.4 for _ in range(3)]
    together = bitmask.concatenate([bitmask.pack(mask) for mask in masks], 15)
    assert together.shape == (bitmask.packed_size(45),)
    assert torch.equal(bitmask.unpack(together, 45), torch.cat(masks))


def test_several_adapters() -> None:
    model = adapted(target_parameters=["experts.down_proj"])
    model.add_adapter("both", DowserConfig(**RANDOM | {"target_parameters": ALL, "seed": 1, "init_weights": False}))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".both"))
    with torch.no_grad():
        first = model(IDS).logits
        model.set_adapter("both")
        second = model(IDS).logits
        assert not torch.allclose(first, second)
        model.base_model.set_adapter(["default", "both"])
        together = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, models.tiny_mixtral()(IDS).logits)
        plain = dense(model, models.tiny_mixtral, "default", "both")
        torch.testing.assert_close(together, plain(IDS).logits)
        model.merge_adapter()
        assert torch.equal(model(IDS).logits, together)
        model.unmerge_adapter()
        model.delete_adapter("both")
        model.set_adapter("default")
        assert torch.equal(model(IDS).logits, first)


def test_disabling_unmerges() -> None:
    model = adapted()
    with torch.no_grad():
        expected = model(IDS).logits
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, models.tiny_mixtral()(IDS).logits)
        assert torch.equal(model(IDS).logits, expected)


def test_copies_are_independent() -> None:
    model = adapted()
    with torch.no_grad():
        expected = model(IDS).logits
        twin = copy.deepcopy(model)
        for _, weight in fused_weights(twin):
            weight.parameter.zero_()
        assert torch.equal(model(IDS).logits, expected)
        assert not torch.allclose(twin(IDS).logits, expected)


def test_generates() -> None:
    model = adapted()
    written = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.merge_and_unload().generate(input_ids=IDS, max_new_tokens=4, do_sample=False), written)


def test_hooks_on_the_experts_still_run() -> None:
    model, seen = adapted(), []
    base = model.get_base_model().model.layers[0].mlp.experts.base_layer
    base.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(IDS)
    assert seen == [1]


def test_compiles() -> None:
    model = adapted()
    torch._dynamo.reset()
    experts = model.get_base_model().model.layers[0].mlp.experts
    x = torch.randn(6, models.HIDDEN)
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 3]] * 2), torch.full((6, 2), 0.5)
    results = []
    for run in (experts, torch.compile(experts, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = run(x, index, weights)
        y.square().sum().backward()
        results.append((y.detach(), *(layer.dowser_values["default"].grad.clone() for _, layer in experts.adapted())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
