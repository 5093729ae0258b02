"""Bases that torchao and HQQ quantised, on the CPU; the kinds of layers that cannot be read, and what is said there.

transformers 5.24 cannot quantise with HQQ ("not available yet"), so its layers are put into the model by hand.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8Linear

from dowser_peft import DowserConfig, base_layer, probe
from dowser_peft.base_layer import base_weight, passes_gradients
from tests.models import tiny_llama, tiny_qwen2
from tests.test_model import IDS, QUICK, dowser_layers, train

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed, and no part of the test extra")


def torchao_base(folder: Path, quantisation: str = "Int8WeightOnlyConfig") -> nn.Module:
    """A Llama quantised as it is loaded; ``folder`` holds the unquantised one afterwards."""
    import torchao.quantization

    tiny_llama(**SIZES).save_pretrained(folder)
    config = TorchAoConfig(getattr(torchao.quantization, quantisation)())
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


def hqq_base(folder: Path) -> nn.Module:
    """A Qwen 2 (its q, k and v have biases), all of its layers but the head in 4 bit."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = tiny_qwen2(**{name: size for name, size in SIZES.items() if name != "head_dim"})
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.fill_(0.5)  # zero at the start
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in linear:
        settings = {"compute_dtype": torch.float32, "device": "cpu"}
        quantised = HQQLinear(model.get_submodule(name), BaseQuantizeConfig(nbits=4, group_size=64), **settings)
        model.set_submodule(name, quantised)
    return model


BASES = [
    pytest.param(torchao_base, "torchao", id="torchao int8", marks=needs("torchao")),
    pytest.param(hqq_base, "hqq", id="HQQ 4-bit", marks=needs("hqq")),
]


@pytest.mark.parametrize("granularity", ["element", "column"])
@pytest.mark.parametrize(("make_base", "backend"), BASES)
def test_the_whole_life_of_an_adapter(
    make_base: Callable[[Path], nn.Module], backend: str, granularity: Any, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base")
    expected = base(IDS).logits.detach()
    model = get_peft_model(base, DowserConfig(granularity=granularity, **QUICK))
    layers = dowser_layers(model)
    assert len(layers) == 14
    assert {layer.quantization_backend.backend_name for layer in layers.values()} == {backend}
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    losses = train(model, lr=0.03)
    assert losses[-1] < losses[0]
    model.eval()
    trained = model(IDS).logits.detach()
    moved = float((trained - expected).abs().max())
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)

    biases = {name: layer.get_base_layer().bias for name, layer in layers.items()}
    model.merge_adapter(safe_merge=True)
    for name, layer in layers.items():  # HQQ's layers are replaced
        assert (layer.get_base_layer().bias is None) == (biases[name] is None)
        assert biases[name] is None or torch.equal(layer.get_base_layer().bias, biases[name])
    assert float((model(IDS).logits.detach() - trained).abs().max()) < moved / 2  # quantised again
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, trained)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_base(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, trained)
    merged = loaded.merge_and_unload()
    assert not dowser_layers(merged)
    assert float((merged(IDS).logits.detach() - trained).abs().max()) < moved / 2


@pytest.mark.parametrize("granularity", ["element", "column"])
@pytest.mark.parametrize(("make_base", "backend"), BASES)
def test_gradients_are_those_of_the_dequantised_layer(
    make_base: Callable[[Path], nn.Module], backend: str, granularity: Any, tmp_path: Path
) -> None:
    config = DowserConfig(importance="magnitude", granularity=granularity, init_weights=False)
    layer = next(iter(dowser_layers(get_peft_model(make_base(tmp_path), config)).values()))
    with base_weight(layer) as weight:
        effective = (weight.float() + layer.get_delta_weight("default").detach()).requires_grad_()
    x = torch.randn(3, 5, layer.in_features)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).square().sum().backward()
    nn.functional.linear(theirs, effective, layer.get_base_layer().bias).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    values = layer.dowser_values["default"]
    if granularity == "column":
        wanted = effective.grad[:, layer.dowser_columns["default"].long()]
    else:
        wanted = effective.grad.view(-1)[layer.positions("default")]
    torch.testing.assert_close(values.grad, wanted, rtol=1e-4, atol=1e-3)


@needs("torchao")
def test_a_layer_that_quantises_its_input(tmp_path: Path) -> None:
    """Nothing flows back through it: no probe, no columns. Single weights train, chosen on the unquantised base."""
    kind = "Int8DynamicActivationInt8WeightConfig"
    base = torchao_base(tmp_path, kind)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' cannot be probed: .*Int8WeightOnly"):
        get_peft_model(base, DowserConfig(**QUICK))
    with pytest.raises(ValueError, match="cannot be probed: its layer quantises the input as well"):
        probe(base, **QUICK)
    with pytest.raises(ValueError, match="cannot train whole columns: .*granularity='element'"):
        get_peft_model(base, DowserConfig(granularity="column", importance="magnitude"))
    assert not dowser_layers(base)

    statistics = probe(AutoModelForCausalLM.from_pretrained(tmp_path), **QUICK, progress=False)
    model = get_peft_model(base, DowserConfig(importance=statistics))
    losses = train(model, lr=0.03)
    assert losses[-1] < losses[0]
    assert all(layer.dowser_values["default"].detach().any() for layer in dowser_layers(model).values())

    columns = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path), DowserConfig(granularity="column", importance="magnitude")
    )
    columns.save_pretrained(tmp_path / "columns")
    PeftModel.from_pretrained(torchao_base(tmp_path, kind), tmp_path / "columns")  # to generate with
    with pytest.raises(ValueError, match="cannot train whole columns"):
        PeftModel.from_pretrained(torchao_base(tmp_path, kind), tmp_path / "columns", is_trainable=True)


@needs("torchao")
def test_which_layers_pass_gradients(tmp_path: Path) -> None:
    assert passes_gradients(nn.Linear(8, 8))
    assert passes_gradients(torchao_base(tmp_path).model.layers[0].mlp.up_proj)
    layer = torchao_base(tmp_path, "Int8DynamicActivationInt8WeightConfig").model.layers[0].mlp.up_proj
    with torch.no_grad():  # nor does it depend on where it is asked
        assert not passes_gradients(layer)


class PackedLinear(nn.Linear):
    """Stands for compressed-tensors: the weight is there under other names only."""

    def __init__(self) -> None:
        super().__init__(16, 12)
        del self.weight
        self.register_buffer("weight_packed", torch.zeros(12, 2, dtype=torch.int32))


@pytest.mark.parametrize(
    ("layer", "stored"), [(FP8Linear(16, 12), "torch.float8_e4m3fn"), (PackedLinear(), "something else")]
)
def test_layers_whose_weight_cannot_be_read(layer: nn.Module, stored: str) -> None:
    """Said before anything is probed, with what to do; whole columns need no weight."""
    with pytest.raises(TypeError, match=rf"'0' of type .*Linear is not supported: .*as {stored}.*unquantised"):
        get_peft_model(nn.Sequential(layer), DowserConfig(importance="random", target_modules=["0"]))
    with pytest.raises(ValueError, match="'0' of type .* cannot be scored: .*importance='random'"):
        get_peft_model(
            nn.Sequential(layer), DowserConfig(granularity="column", importance="magnitude", target_modules=["0"])
        )
    config = DowserConfig(granularity="column", importance="random", target_modules=["0"])
    model = get_peft_model(nn.Sequential(layer), config)
    assert dowser_layers(model)["base_model.model.0"].dowser_values["default"].shape == (12, 2)
    with pytest.raises(
        ValueError, match="cannot merge into a .*Linear: its weight is not a matrix of ordinary floats"
    ):
        model.merge_adapter()


def test_gptq_layers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gptqmodel installed PEFT knows its layers, and that their weights cannot be had."""
    backend = ForwardOnlyQuantizationBackend("gptq")
    monkeypatch.setattr(base_layer, "resolve_quantization_backend", lambda layer, **_: backend)
    with pytest.raises(TypeError, match="'0' is not supported: its gptq weights cannot be dequantised.*'column'"):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), DowserConfig(importance="random", target_modules=["0"]))
