"""Statistics of fused experts against other ways to compute them: dense experts, full Jacobians, explicit loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dowser_peft import ProbeStatistics, probe
from dowser_peft.fused_experts import expert_name, fused_weights
from dowser_peft.targets import default_parameters, default_targets
from tests import models
from tests.probing.helpers import collect, fixed_signs, prompts
from tests.probing.test_collect import assert_same, padded, ragged

MOE = [
    models.tiny_mixtral,
    models.tiny_qwen2_moe,
    models.tiny_qwen3_moe,
    models.tiny_olmoe,
    models.tiny_deepseek_v3,
    models.tiny_gpt_oss,
    models.tiny_llama4,
]
QUICK: dict[str, Any] = {"num_prompts": 5, "num_probes": 2, "prompt_length": 6, "progress": False}


class DenseExperts:
    """Every expert computes every token, and the router's weight is zero where it did not choose it.

    ``shift`` is added to what the experts compute: the Jacobian with respect to it is that with respect to z.
    """

    def __init__(self, gated: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        self.gated = gated
        self.shift: dict[tuple[int, str], torch.Tensor] = {}  # [E, tokens, out]
        self.inputs: dict[tuple[int, str], torch.Tensor] = {}  # [E, tokens, in], zero where not chosen
        self.chosen: dict[int, torch.Tensor] = {}  # [tokens, E]

    def __call__(self, module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        E = module.num_experts
        router = torch.zeros(len(x), E, dtype=x.dtype).scatter(1, index, weights.to(x.dtype))  # [tokens, E]
        chosen = torch.zeros(len(x), E, dtype=torch.bool).scatter(1, index, True)
        self.chosen[id(module)] = chosen
        h = x.expand(E, *x.shape)
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(module, name)
            z = torch.einsum("eti,eio->eto" if module.is_transposed else "eti,eoi->eto", h, weight)
            if module.has_bias:
                z = z + getattr(module, f"{name}_bias")[:, None]
            self.inputs[id(module), name] = (h * chosen.T[..., None]).detach()
            z = z + self.shift.get((id(module), name), 0)
            h = self.gated(module, z) if name == "gate_up_proj" else z
        return torch.einsum("te,eto->to", router, h)

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        ALL_EXPERTS_FUNCTIONS["dense"] = self
        before = model.config._experts_implementation
        model.config._experts_implementation = "dense"
        yield
        model.config._experts_implementation = before
        del ALL_EXPERTS_FUNCTIONS["dense"]


def silu_gate(module: Any, z: torch.Tensor) -> torch.Tensor:
    gate, up = z.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def gpt_oss_gate(module: Any, z: torch.Tensor) -> torch.Tensor:
    gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize(
    ("build", "gate"),
    [(models.tiny_mixtral, silu_gate), (models.tiny_qwen2_moe, silu_gate), (models.tiny_gpt_oss, gpt_oss_gate)],
)
def test_statistics_are_those_of_dense_experts_and_the_full_jacobian(
    build: Any, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build().double(), prompts(3, 4)
    signs = (torch.randint(0, 2, (4, models.VOCABULARY)) * 2 - 1).double()
    fixed_signs(monkeypatch, signs)
    names = default_parameters(model)
    activation, sensitivity, _ = collect(model, names, batches=[{"input_ids": ids}], num_probes=4)
    reached = 0
    for row in range(3):
        dense = DenseExperts(gate)
        with dense.installed(model):
            with torch.no_grad():
                model(ids[row : row + 1])
            for name, weight in fused_weights(model):
                key = (id(weight.experts), weight.parameter_name)

                def logits(
                    shift: torch.Tensor, key: Any = key, dense: Any = dense, prompt: Any = ids[row : row + 1]
                ) -> torch.Tensor:
                    dense.shift = {key: shift}
                    return model(prompt).logits[0, -1]

                zero = torch.zeros(weight.num_experts, 4, weight.expert_shape[0], dtype=torch.float64)
                J = torch.autograd.functional.jacobian(logits, zero)  # [V, E, tokens, out]
                J = J * dense.chosen[id(weight.experts)].T[None, :, :, None]
                g = torch.einsum("rv,veto->reto", signs, J)
                psi = g.square().sum(2).mean(0).sqrt()  # [E, out]
                torch.testing.assert_close(sensitivity[name][row].double(), psi, rtol=1e-6, atol=1e-9)
                a = dense.inputs[key].abs().mean(1)  # [E, in]: over all tokens of the prompt
                torch.testing.assert_close(activation[name][row].double(), a, rtol=1e-6, atol=1e-9)
                reached += int(psi.any(1).sum())
    assert reached > 3 * len(names)


class ShiftedLlama4(nn.Module):
    """Llama 4's experts by a loop, with ``shift`` added to what they compute."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.weights = {"gate_up_proj": experts.gate_up_proj.detach(), "down_proj": experts.down_proj.detach()}
        self.shift: dict[str, torch.Tensor] = {}  # [E, tokens, out]
        self.inputs: dict[str, torch.Tensor] = {}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        h = hidden_states.view(4, -1, models.HIDDEN)
        for name, weight in self.weights.items():
            self.inputs[name] = h.detach()
            z = torch.stack([x @ matrix for x, matrix in zip(h, weight, strict=True)]) + self.shift.get(name, 0)
            h = silu_gate(None, z) if name == "gate_up_proj" else z
        return h.reshape(-1, models.HIDDEN)


@pytest.mark.parametrize("tokens_per_expert", [1, 2])
def test_statistics_of_experts_that_multiply_every_token(
    tokens_per_expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models.tiny_llama4(num_experts_per_tok=tokens_per_expert).double(), prompts(3, 4)
    signs = (torch.randint(0, 2, (4, models.VOCABULARY)) * 2 - 1).double()
    fixed_signs(monkeypatch, signs)
    names = default_parameters(model)
    activation, sensitivity, _ = collect(model, names, batches=[{"input_ids": ids}], num_probes=4)
    layer = model.model.layers[1].feed_forward
    layer.experts = shifted = ShiftedLlama4(layer.experts)
    for row in range(3):
        for name in names:
            kind = name.rpartition(".")[2]

            def logits(shift: torch.Tensor, kind: str = kind, prompt: Any = ids[row : row + 1]) -> torch.Tensor:
                shifted.shift = {kind: shift}
                return model(prompt).logits[0, -1]

            zero = torch.zeros(4, 4, sensitivity[name].shape[-1], dtype=torch.float64)
            J = torch.autograd.functional.jacobian(logits, zero)  # [V, E, tokens, out]
            sent = shifted.inputs["gate_up_proj"].abs().sum(-1) > 0  # [E, tokens]
            assert sent.sum(0).tolist() == [tokens_per_expert] * 4
            g = torch.einsum("rv,veto->reto", signs, J * sent[None, :, :, None])
            psi = g.square().sum(2).mean(0).sqrt()
            torch.testing.assert_close(sensitivity[name][row].double(), psi, rtol=1e-6, atol=1e-9)
            a = shifted.inputs[kind].abs().mean(1)
            torch.testing.assert_close(activation[name][row].double(), a, rtol=1e-6, atol=1e-9)


def test_mean_abs_divides_by_all_tokens_of_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = models.tiny_mixtral().double(), prompts(8, 4)
    model.set_experts_implementation("eager")
    signs = (torch.randint(0, 2, (3, models.VOCABULARY)) * 2 - 1).double()
    fixed_signs(monkeypatch, signs)
    names = default_parameters(model)
    batches = [{"input_ids": ids}]
    activation, sensitivity, _ = collect(model, names, batches=batches, num_probes=3, estimator="mean_abs")
    expected = {name: torch.zeros(8, *sensitivity[name].shape[1:], dtype=torch.float64) for name in names}
    for row in range(8):
        dense = DenseExperts(silu_gate)
        with dense.installed(model):
            for name, weight in fused_weights(model):
                shift = torch.zeros(4, 4, weight.expert_shape[0], dtype=torch.float64, requires_grad=True)
                dense.shift = {(id(weight.experts), weight.parameter_name): shift}
                output = model(ids[row : row + 1]).logits[0, -1]
                for xi in signs:
                    (g,) = torch.autograd.grad(output, shift, xi, retain_graph=True)  # [E, tokens, out]
                    g = g * dense.chosen[id(weight.experts)].T[..., None]
                    expected[name][row] += g.abs().mean(1) / 3
    for name in names:
        means = torch.stack([part.mean(0) for part in expected[name].split(4)])
        torch.testing.assert_close(sensitivity[name].double(), means, rtol=1e-6, atol=1e-9)
        assert activation[name].shape[0] == 2


@pytest.mark.parametrize("estimator", ["rms", "mean_abs"])
def test_fused_experts_have_the_statistics_of_experts_that_are_modules(estimator: str) -> None:
    """The same mixture written as a list of linear layers."""

    class Expert(nn.Module):
        def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
            super().__init__()
            self.gate_up, self.down = (nn.Linear(w.shape[1], w.shape[0], bias=False) for w in (gate_up, down))
            self.gate_up.weight.data, self.down.weight.data = gate_up.clone(), down.clone()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(nn.functional.silu(gate) * up)

    class Unfused(nn.Module):
        def __init__(self, fused: Any) -> None:
            super().__init__()
            self.experts = nn.ModuleList(map(Expert, fused.gate_up_proj.data, fused.down_proj.data))

        def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows, place = (index == number).nonzero(as_tuple=True)
                if len(rows):
                    y = y.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
            return y

    fused, plain = models.tiny_mixtral(), models.tiny_mixtral()
    for layer in plain.model.layers:
        layer.mlp.experts = Unfused(layer.mlp.experts)
    batches = [{"input_ids": row[None]} for row in prompts(6, 12)]
    together = collect(fused, default_parameters(fused), batches=batches, estimator=estimator)
    alone = collect(
        plain, [n for n in default_targets(plain) if ".experts." in n], batches=batches, estimator=estimator
    )
    for one, other in zip(together[:2], alone[:2], strict=True):
        for name in one:
            for index in range(4):
                kind = name.rpartition(".")[2].removesuffix("_proj")
                expected = other[f"{name.rpartition('.')[0]}.experts.{index}.{kind}"]
                torch.testing.assert_close(one[name][:, index], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", MOE)
def test_every_mixture_can_be_probed_without_data(build: Any) -> None:
    model = build()
    before = model.config._experts_implementation
    statistics = probe(model, **QUICK)
    expected = list(default_targets(model))
    for name, weight in fused_weights(model):
        expected += [expert_name(name, index) for index in range(weight.num_experts)]
        for index in range(weight.num_experts):
            assert statistics.shape(expert_name(name, index)) == weight.expert_shape
    assert statistics.module_names == expected
    for values in (*statistics.activations.values(), *statistics.sensitivities.values()):
        assert values.shape[0] == 5 and values.dtype == torch.bfloat16 and bool(values.isfinite().all())
    assert model.config._experts_implementation == before
    assert "dowser_probe" not in ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_implementation_in_use_does_not_change_the_result(implementation: str) -> None:
    model, ids = models.tiny_qwen3_moe(), prompts(4, 6)
    names = default_targets(model) + default_parameters(model)
    expected = collect(model, names, batches=[{"input_ids": ids}])
    model.set_experts_implementation(implementation)
    assert_same(collect(model, names, batches=[{"input_ids": ids}]), expected)
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("build", MOE)
def test_batch_size_does_not_change_the_result(build: Any) -> None:
    model, ids = build(), prompts(4, 6)
    names = default_targets(model) + default_parameters(model)
    together = collect(model, names, batches=[{"input_ids": ids}])
    alone = collect(model, names, batches=[{"input_ids": row[None]} for row in ids])
    assert_same(together, alone, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_excluded(side: str) -> None:
    model, rows = models.tiny_mixtral(), ragged()
    names = default_parameters(model)
    together = collect(model, names, batches=[padded(rows, side)])
    alone = collect(model, names, batches=[{"input_ids": row[None]} for row in rows])
    assert_same(together, alone)


def test_only_some_experts_may_be_probed() -> None:
    model, ids = models.tiny_mixtral(), prompts()
    names = default_parameters(model)
    every = collect(model, names, batches=[{"input_ids": ids}])
    some = collect(model, names[1:2], batches=[{"input_ids": ids}])
    assert list(some[0]) == names[1:2]
    for one, other in zip(some[:2], every[:2], strict=True):
        torch.testing.assert_close(one[names[1]], other[names[1]])


def test_the_model_leaves_as_it_came_after_a_failure() -> None:
    model = models.tiny_mixtral()
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the output of module 'model\.layers\.1\.mlp\.experts\.gate_up_proj'"):
        probe(model, **QUICK, batches=[{"input_ids": prompts(4, 20)}])
    assert model.config._experts_implementation == "batched_mm"
    assert "dowser_probe" not in ALL_EXPERTS_FUNCTIONS


def test_no_gradient_of_a_weight_is_computed() -> None:
    model = models.tiny_mixtral()
    probe(model, **QUICK)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_prompts_are_written_by_the_implementation_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the batches of the probe go through the slower one."""
    model, calls = models.tiny_mixtral(), []
    grouped = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *args: calls.append(1) or grouped(*args)
    )
    probe(model, **QUICK, target_modules=[], target_parameters=default_parameters(model))
    assert len(calls) >= 2 * 4  # layers x new tokens


@pytest.mark.parametrize("num_prompts", [1, 5])
def test_saves_and_loads(num_prompts: int, tmp_path: Any) -> None:
    statistics = probe(models.tiny_qwen2_moe(), **QUICK | {"num_prompts": num_prompts})
    statistics.save(tmp_path / "file.safetensors")
    loaded = ProbeStatistics.load(tmp_path / "file.safetensors")
    assert loaded.module_names == statistics.module_names
    for name in statistics.module_names:
        assert torch.equal(loaded.activation(name), statistics.activation(name))
        assert torch.equal(loaded.sensitivity(name), statistics.sensitivity(name))


def test_a_probe_may_end_by_itself() -> None:
    options = QUICK | {"num_prompts": 32, "num_probes": 1}
    statistics = probe(models.tiny_mixtral(), **options, tolerance=0.9, rho=0.3)
    assert statistics.num_prompts == 16
    assert 0 < statistics.mask_error <= 0.9


def test_bad_names() -> None:
    with pytest.raises(
        ValueError, match=r"such as 'model\.layers\.0\.mlp\.experts\.gate_up_proj'; 'down_proj' is none"
    ):
        probe(models.tiny_mixtral(), **QUICK, target_modules=[], target_parameters=["down_proj"])
