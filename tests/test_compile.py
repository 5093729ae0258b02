"""torch.compile(fullgraph=True) of adapted layers: one graph, the results of eager code, nothing kept or stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from dowser_peft import DowserConfig, bitmask
from dowser_peft.layer import Linear
from dowser_peft.sparse_delta import index, ops
from tests.models import tiny_llama
from tests.test_layer import make_layer, random_mask
from tests.test_model import IDS


class Block(nn.Module):
    """Two adapted layers, 10 -> 12 -> 10."""

    def __init__(self, dtype: torch.dtype = torch.float32, conv1d: bool = False, adapters: int = 1) -> None:
        super().__init__()
        self.first = make_layer(dtype, conv1d, adapters=adapters)
        self.second = Linear(nn.Linear(12, 10).to(dtype).requires_grad_(False), "a", 0.3, random_mask(120, 36))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.nn.functional.gelu(self.first(x)))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(call: Any, model: nn.Module, x: torch.Tensor, autocast: bool = False) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of the values."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = call(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_steps_agree(call: Any, model: nn.Module, x: torch.Tensor, autocast: bool = False) -> None:
    for got, expected in zip(step(call, model, x, autocast), step(model, model, x, autocast), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"conv1d": True}, {"adapters": 3}, {"dtype": torch.bfloat16}],
    ids=["linear", "conv1d", "three adapters", "bfloat16"],
)
def test_training_step_and_inference_are_one_graph(options: dict[str, Any]) -> None:
    model = Block(**options)
    x = torch.randn(2, 3, 10, dtype=options.get("dtype", torch.float32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_steps_agree(compiled, model, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))


def test_autocast() -> None:
    model = Block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_steps_agree(compiled, model, torch.randn(4, 10), autocast=True)


def test_inductor() -> None:
    model = Block(adapters=2)
    compiled = torch.compile(model, fullgraph=True)
    assert_steps_agree(compiled, model, torch.randn(4, 10))


@pytest.mark.parametrize("use_reentrant", [False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = Block()

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    assert_steps_agree(compiled, model, torch.randn(4, 10))


def test_the_effective_weight_is_not_kept_for_backward() -> None:
    """Neither the forward's, nor the backward's computed ahead of time, for any partitioner."""
    from functorch.compile import default_partition, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    for partition in (default_partition, min_cut_rematerialization_partition):
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, _inputs: Any, graphs: Any = graphs) -> Any:
            graphs.append(graph)
            return graph

        model = make_layer(adapters=2)
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        compiled(torch.randn(4, 10, requires_grad=True)).sum().backward()
        forward, backward = graphs
        for graph in graphs:
            calls = [node for node in graph.graph.nodes if node.target is torch.ops.dowser.effective_weight.default]
            assert len(calls) == 1
        weight = model.get_base_layer().weight
        placeholders = [node for node in forward.graph.nodes if node.op == "placeholder"]
        (outputs,) = next(node for node in forward.graph.nodes if node.op == "output").args
        kept = [node for node in outputs[1:] if isinstance(node, torch.fx.Node) and node not in placeholders]
        assert all(node.meta["val"].numel() < weight.numel() for node in kept)
        assert [node.target for node in backward.graph.nodes].count(torch.ops.dowser.gather.default) == 2


def test_a_mask_that_is_written_or_replaced_is_followed_without_compiling_again() -> None:
    model = make_layer()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 10)
    assert_steps_agree(compiled, model, x)
    first = step(compiled, model, x)
    model.dowser_mask["a"].copy_(random_mask(120, 36, seed=7))
    assert_steps_agree(compiled, model, x)
    assert not torch.equal(step(compiled, model, x)[0], first[0])
    model.load_state_dict({"dowser_mask.a": random_mask(120, 36, seed=8)}, strict=False)
    assert_steps_agree(compiled, model, x)
    model.load_state_dict({"dowser_mask.a": random_mask(120, 36, seed=9)}, strict=False, assign=True)
    assert_steps_agree(compiled, model, x)
    assert counter.frame_count == 1


def test_positions_are_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = []
    real = bitmask.positions
    monkeypatch.setattr(index.bitmask, "positions", lambda *args: derived.append(1) or real(*args))
    model = make_layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        step(compiled, model, torch.randn(4, 10))
    assert len(derived) == 1


def test_an_adapter_waiting_for_its_file() -> None:
    """It computes nothing, refuses to train, and works without compiling again as soon as it is loaded."""
    model = Linear(nn.Linear(10, 12).requires_grad_(False), "a", 0.3, mask=None, inference_mode=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(4, 10)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    values = torch.randn(36)
    model.load_state_dict({"dowser_mask.a": random_mask(120, 36), "dowser_values.a": values}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1

    waiting = Linear(nn.Linear(10, 12).requires_grad_(False), "a", 0.3, mask=None)
    with pytest.raises(RuntimeError, match="cannot train before its mask has been loaded"):
        torch.compile(waiting, fullgraph=True, backend="aot_eager")(x).sum().backward()


def test_a_mask_of_another_adapter_is_an_error() -> None:
    model = make_layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.dowser_mask["a"].copy_(random_mask(120, 35))
    with pytest.raises(RuntimeError, match="the mask marks 35 weights but there are 36 values"):
        compiled(torch.randn(1, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 10).to(dtype)
    masks, values = [random_mask(120, 36, seed) for seed in range(2)], [torch.randn(36), torch.randn(36)]
    for after in (None, torch.randn(2, 12)):
        torch.library.opcheck(ops.effective_weight_op, (weight, masks, values, torch.bfloat16, "auto", after))
    torch.library.opcheck(ops.gather_op, (weight, masks[0], 36, torch.float32, "auto"))
    positions = bitmask.positions(masks[0], 120)
    torch.library.opcheck(ops.gather_op, (weight.T, positions, 36, torch.float32, "torch"))


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_a_quantised_base_breaks_the_graph_and_stays_correct(kind: str) -> None:
    """PEFT dequantises by the class of the weight, a tensor subclass that Dynamo does not look into."""
    import bitsandbytes as bnb

    if kind == "4-bit":
        base = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
        base.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    else:
        base = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        base.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False).to("cpu")
    model = Linear(base, "a", 0.1, random_mask(4096, 410), init_weights=False)
    assert_steps_agree(torch.compile(model, backend="aot_eager"), model, torch.randn(4, 64))


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def generate(model: nn.Module, **options: Any) -> torch.Tensor:
    lengths = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    return model.generate(input_ids=IDS.to(model.device), cache_implementation="static", **lengths, **options)


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "eager"), pytest.param("cuda", "inductor", marks=[pytest.mark.gpu, NEEDS_CUDA])],
)
@pytest.mark.parametrize("granularity", ["element", "column"])
def test_generation(granularity: Any, device: str, backend: str) -> None:
    """With a static cache: one graph for the prompt, one for all the tokens after it, no break in either."""
    base = tiny_llama().to(device)
    model = get_peft_model(base, DowserConfig(granularity=granularity, importance="magnitude", init_weights=False))
    model.eval()
    expected = generate(model)
    with model.disable_adapter():
        assert not torch.equal(generate(model), expected)
    counter = CompileCounterWithBackend(backend)
    base.forward = torch.compile(base.forward, fullgraph=True, backend=counter)
    for _ in range(2):
        assert torch.equal(generate(model), expected)
    assert counter.frame_count == 2
