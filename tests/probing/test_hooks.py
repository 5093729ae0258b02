"""The hooks against other ways to compute the same numbers: plain hooks, full Jacobians, explicit loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dowser_peft import bitmask
from dowser_peft.base_layer import linear_shape
from dowser_peft.scoring import bottom_rho_mask, num_trainable
from dowser_peft.targets import default_targets
from tests import models
from tests.probing.helpers import collect, fixed_signs, prompts


def jacobian(model: nn.Module, name: str, ids: torch.Tensor) -> torch.Tensor:
    """df/dz of the last logits of one prompt, by torch's own means: ``[V, tokens, out]``."""
    module = model.get_submodule(name)
    kept: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output.detach()))
    model(ids)
    handle.remove()

    def rest(z: torch.Tensor) -> torch.Tensor:
        handle = module.register_forward_hook(lambda *_: z)
        try:
            return model(ids).logits[0, -1]
        finally:
            handle.remove()

    return torch.autograd.functional.jacobian(rest, kept[0])[:, 0]


NAMES = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("name", NAMES)
def test_sensitivity_is_that_of_the_full_jacobian_with_the_same_signs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models.tiny_llama().double(), prompts()
    signs = torch.randint(0, 2, (4, models.VOCABULARY)) * 2.0 - 1
    fixed_signs(monkeypatch, signs)
    _, sensitivity, _ = collect(model, [name], batches=[{"input_ids": ids}], num_probes=4)
    for row in range(3):
        J = jacobian(model, name, ids[row : row + 1])  # [V, T, out]
        total = torch.zeros(J.shape[-1], dtype=torch.float64)
        for xi in signs.double():
            g = torch.einsum("v,vti->ti", xi, J)
            total += g.square().sum(0)
        torch.testing.assert_close(sensitivity[name][row].double(), (total / 4).sqrt(), rtol=1e-6, atol=1e-9)


def test_all_sign_vectors_together_give_the_norm_of_the_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    model, name = models.tiny_llama(vocab_size=7).double(), NAMES[1]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=7)))  # 2^7 x 7
    fixed_signs(monkeypatch, signs)
    ids = torch.tensor([[3, 4, 5]])
    _, sensitivity, _ = collect(model, [name], batches=[{"input_ids": ids}], num_probes=len(signs))
    exact = jacobian(model, name, ids).square().sum((0, 1)).sqrt()
    torch.testing.assert_close(sensitivity[name][0].double(), exact, rtol=1e-6, atol=1e-9)


def test_many_random_signs_converge_to_the_norm_of_the_jacobian() -> None:
    model, name = models.tiny_llama(vocab_size=12).double(), NAMES[2]
    ids = torch.tensor([[3, 4, 5, 6]])
    exact = jacobian(model, name, ids).square().sum((0, 1)).sqrt()

    def error(num_probes: int) -> float:
        _, sensitivity, _ = collect(model, [name], batches=[{"input_ids": ids}], num_probes=num_probes)
        return float((sensitivity[name][0] / exact - 1).abs().mean())

    assert error(600) < 0.05 < error(4)


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_gpt2, models.tiny_opt, models.tiny_bert])
def test_activation_is_the_mean_that_a_plain_hook_sees(build: Any) -> None:
    model, ids = build(), prompts()
    names = default_targets(model)
    expected: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, args, _output, name=name: expected.update({name: args[0].reshape(3, 5, -1).abs().mean(1)})
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    activation, _, _ = collect(model, batches=[{"input_ids": ids}])
    for name in names:
        assert activation[name].dtype == torch.float32
        torch.testing.assert_close(activation[name], expected[name], rtol=1e-5, atol=1e-6)


def test_mean_abs_is_the_formula_of_the_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """S = |W| * mean over batches of four and r of (mean |g| outer mean |h|), by loops."""
    model, name, ids = models.tiny_llama().double(), NAMES[1], prompts(8)
    module = model.get_submodule(name)
    signs = torch.randint(0, 2, (3, models.VOCABULARY)) * 2.0 - 1
    fixed_signs(monkeypatch, signs)
    activation, sensitivity, _ = collect(
        model, [name], batches=[{"input_ids": ids}], num_probes=3, estimator="mean_abs", batch_size=8
    )
    assert activation[name].shape[0] == sensitivity[name].shape[0] == 2

    S = torch.zeros(linear_shape(module), dtype=torch.float64)
    for batch in ids.split(4):
        seen: dict[str, torch.Tensor] = {}

        def keep(_module: Any, args: Any, output: torch.Tensor, seen: Any = seen) -> None:
            output.retain_grad()
            seen.update(h=args[0].detach(), z=output)

        for xi in signs.double():
            handle = module.register_forward_hook(keep)
            (model(batch).logits[:, -1] * xi).sum().backward()
            handle.remove()
            g, h = seen["z"].grad, seen["h"]
            assert g is not None
            S += torch.outer(g.abs().mean((0, 1)), h.abs().mean((0, 1))) / (2 * 3)
    model.zero_grad()
    ours = sensitivity[name].double().T @ activation[name].double() / 2
    torch.testing.assert_close(ours, S, rtol=1e-5, atol=1e-12)

    score = module.weight.detach().abs() * S
    k = num_trainable(score.numel(), 0.1)
    theirs = score <= score.flatten().kthvalue(k).values
    mask = bottom_rho_mask(module.weight.detach(), activation[name], sensitivity[name], 0.1)
    assert torch.equal(bitmask.unpack(mask, score.numel()), theirs.flatten())


def test_modules_that_share_an_input_share_its_statistics() -> None:
    _, _, groups = collect(models.tiny_llama())
    layer = "model.layers.0."
    for name in ("q_proj", "k_proj", "v_proj"):
        assert groups[f"{layer}self_attn.{name}"] == f"{layer}self_attn.q_proj"
    assert groups[f"{layer}mlp.gate_proj"] == groups[f"{layer}mlp.up_proj"] == f"{layer}mlp.gate_proj"
    assert groups[f"{layer}mlp.down_proj"] == f"{layer}mlp.down_proj"
    assert len(set(groups.values())) == 4 * models.LAYERS


class _SharesSometimes(nn.Module):
    """``b`` reads the same tensor as ``a`` in the first pass, another one from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.passes = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.a(x) + self.b(x if self.passes == 1 else x * 3)


def test_modules_that_share_only_sometimes_keep_their_own_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    activation, _, groups = collect(_SharesSometimes(), ["a", "b"], batches=[x[:1], x[1:]])
    assert groups == {"a": "a", "b": "b"}
    torch.testing.assert_close(activation["b"], 3 * activation["a"])  # all prompts were probed again


class _Modifies(nn.Module):
    """In-place operations everywhere: on outputs, and on an input between two modules that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).mul_(2)
        y = self.a(x.relu_())
        y *= 0.5
        return self.last(y + self.b(x + 1).exp_()).sigmoid_()


def test_in_place_operations_on_outputs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = _Modifies().double(), torch.randn(1, 3, 4, dtype=torch.float64)
    sign = torch.ones(1, 4)
    fixed_signs(monkeypatch, sign)
    _, sensitivity, _ = collect(model, ["first", "a", "b", "last"], batches=[x], num_probes=1)
    for name in ("first", "a", "b", "last"):
        module = model.get_submodule(name)
        kept: list[torch.Tensor] = []

        def keep(_module: Any, _args: Any, output: torch.Tensor, kept: Any = kept) -> torch.Tensor:
            kept.append(output.detach().clone().requires_grad_())
            return kept[0].clone()

        handle = module.register_forward_hook(keep)
        output = model(x).sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(output, kept[0])
        torch.testing.assert_close(sensitivity[name][0].double(), gradient[0].square().sum(0).sqrt())


def test_an_input_modified_in_place_is_not_shared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            y = self.a(x)
            return y + self.b(x.mul_(3))

    activation, _, groups = collect(Model(), ["a", "b"], batches=[torch.ones(2, 3, 4)])
    assert groups["b"] == "b"
    torch.testing.assert_close(activation["b"], 3 * activation["a"])


def test_a_module_called_twice_counts_the_tokens_of_both_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 3, 4)
    fixed_signs(monkeypatch, torch.ones(1, 4))
    activation, sensitivity, _ = collect(model, ["layer"], batches=[x], num_probes=1)
    z = model.layer(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(model.layer(z.tanh()).sum(), z)
    torch.testing.assert_close(activation["layer"], (x.abs().mean(1) + z.tanh().abs().mean(1)).detach() / 2)
    torch.testing.assert_close(sensitivity["layer"], (g.square().sum(1) + 3.0).sqrt())  # g = 1 at the second call


def test_one_forward_serves_all_backwards_and_no_weight_gets_a_gradient() -> None:
    model = models.tiny_llama()
    ids = prompts(4)
    forwards, gradients = [], []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradients.append(gradient))
    collect(model, batches=[{"input_ids": ids[:2]}, {"input_ids": ids[2:]}], num_probes=5)
    assert len(forwards) == 2
    assert not gradients
    assert all(parameter.grad is None for parameter in model.parameters())


class _Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and func is not torch.ops.aten.t.default:
            self.shapes.add(tuple(result.shape))
        return result


def test_nothing_of_the_size_of_a_weight_is_computed() -> None:
    model = models.tiny_llama(intermediate_size=40, hidden_size=36, head_dim=14)
    names = default_targets(model)
    with _Shapes() as seen:
        collect(model, batches=[{"input_ids": prompts(2, 5)}])
    weights = {linear_shape(model.get_submodule(name)) for name in names}
    assert seen.shapes
    assert not seen.shapes & (weights | {shape[::-1] for shape in weights})


class _Waits(TorchDispatchMode):
    """Counts reads of a value on the host, for which a GPU would have to finish first."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_no_backward_pass_waits_for_the_device() -> None:
    def waits(num_probes: int) -> int:
        with _Waits() as seen:
            collect(models.tiny_llama(), batches=[{"input_ids": prompts()}], num_probes=num_probes)
        return seen.count

    assert waits(6) == waits(1) > 0


def test_albert_shares_one_layer_between_all_depths() -> None:
    model = models.tiny_albert()
    activation, sensitivity, _ = collect(model, batches=[{"input_ids": prompts()}])
    assert all(bool(value.isfinite().all()) and bool(value.any()) for value in sensitivity.values())
    seen = []
    name = default_targets(model)[0]
    model.get_submodule(name).register_forward_hook(lambda _module, args, _output: seen.append(args[0].abs().mean(1)))
    with torch.no_grad():
        model(prompts())
    torch.testing.assert_close(activation[name], torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)


def test_tokens_first_layouts_are_told_apart() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1).sigmoid()

    torch.manual_seed(0)
    x = torch.randn(2, 5, 4)
    activation, sensitivity, _ = collect(TokensFirst(), ["layer"], batches=[x])
    torch.testing.assert_close(activation["layer"], x.abs().mean(1))
    alone = torch.cat([collect(TokensFirst(), ["layer"], batches=[row])[0]["layer"] for row in x.split(1)])
    torch.testing.assert_close(activation["layer"], alone)
    assert sensitivity["layer"].shape == (2, 4)


def test_experts_are_probed_prompt_by_prompt_and_may_be_left_out() -> None:
    model, x = models.tiny_routed(num_experts=6), torch.randn(4, 3, models.HIDDEN)
    names = default_targets(model)
    assert len(names) == models.LAYERS * 6 * 2
    activation, sensitivity, _ = collect(model, names, batches=list(x.split(1)))
    reached = torch.stack([value.any(1) for value in activation.values()])  # [modules, N]
    assert bool(reached.any(1).any())
    assert not bool(reached.all()), "the test needs an expert that some prompt never reaches"
    for name in names:
        assert activation[name].shape[0] == sensitivity[name].shape[0] == 4
        assert not bool(sensitivity[name][~activation[name].any(1)].any())
    with pytest.raises(ValueError, match="one prompt each"):
        collect(model, names, batches=[x])
