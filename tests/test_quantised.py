"""bitsandbytes 4-bit and 8-bit bases: train, disable, merge, unmerge, save and load. They run on the CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from dowser_peft import DowserConfig, bitmask, probe
from dowser_peft.base_layer import base_weight, differentiable_4bit, unpack_4bit
from tests.models import tiny_llama
from tests.test_model import IDS, QUICK, dowser_layers, train

QUANTISATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # what 4-bit blocks of 64 weights need


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    tiny_llama(**SIZES).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def load(path: Path, kind: str, device: str = "cpu") -> nn.Module:
    quantisation = BitsAndBytesConfig(**QUANTISATIONS[kind])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantisation, device_map=device)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_the_whole_life_of_an_adapter(kind: str, base_path: Path, tmp_path: Path) -> None:
    base = load(base_path, kind)
    expected = base(IDS).logits.detach()
    model = get_peft_model(base, DowserConfig(rho=0.1, **QUICK))
    layers = dowser_layers(model)
    assert len(layers) == 14 and all(layer.quantization_backend is not None for layer in layers.values())
    # 8-bit matrix products quantise the input as well, the adapter's do not
    tolerance = 0.05 if kind == "int8" else 1e-5
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=tolerance * float(expected.abs().max()))

    losses = train(model, lr=0.03)
    assert losses[-1] < losses[0]
    model.eval()
    trained = model(IDS).logits.detach()
    moved = float((trained - expected).abs().max())
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)

    stored = {name: layer.get_base_layer().weight.data.clone() for name, layer in layers.items()}
    with pytest.warns(UserWarning, match=r"base.dequantize\(\)") as raised:
        model.merge_adapter(safe_merge=True)
    assert sum("base.dequantize()" in str(each.message) for each in raised) == 1
    assert float((model(IDS).logits - trained).abs().max()) < moved  # quantised again, but closer than without
    model.unmerge_adapter()
    for name, layer in layers.items():
        assert torch.equal(layer.get_base_layer().weight.data, stored[name])
    assert torch.equal(model(IDS).logits, trained)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)

    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(base_path, kind), tmp_path / "adapter")
    assert torch.equal(loaded(IDS).logits, trained)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_are_those_of_the_dequantised_layer(kind: str, base_path: Path) -> None:
    model = get_peft_model(load(base_path, kind), DowserConfig(importance="magnitude"))
    layer = next(iter(dowser_layers(model).values()))
    with base_weight(layer) as weight:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(weight.float().clone())
    x = torch.randn(3, 5, layer.in_features)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).square().sum().backward()
    plain(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    where = bitmask.unpack(layer.dowser_mask["default"], layer.numel)
    torch.testing.assert_close(
        layer.dowser_values["default"].grad, plain.weight.grad.view(-1)[where], rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_prepare_model_for_kbit_training(kind: str, base_path: Path) -> None:
    base = prepare_model_for_kbit_training(load(base_path, kind), use_gradient_checkpointing=True)
    model = get_peft_model(base, DowserConfig(**QUICK)).train()
    losses = train(model, lr=0.03)
    assert losses[-1] < losses[0]


def test_masks_are_chosen_from_the_dequantised_weight(base_path: Path) -> None:
    base = load(base_path, "nf4")
    statistics = probe(base, **QUICK, progress=False)
    model = get_peft_model(base, DowserConfig(importance=statistics, rho=0.2))
    for name, layer in dowser_layers(model.get_base_model()).items():
        with base_weight(layer) as weight:
            factors = statistics.sensitivity(name).float().T @ statistics.activation(name).float()
            score = (weight.abs().float() * factors).view(-1)
        mask = bitmask.unpack(layer.dowser_mask["default"], layer.numel)
        assert score[mask].max() <= score[~mask].min()


def test_an_adapter_of_the_full_base_loads_on_a_quantised_one(base_path: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_path), DowserConfig(**QUICK))
    train(model, lr=0.03)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(base_path, "nf4"), tmp_path / "adapter")
    for name, layer in dowser_layers(loaded).items():
        assert torch.equal(layer.dowser_values["default"], dowser_layers(model)[name].dowser_values["default"])


class _Packable(nn.Module):
    """Stands for bitsandbytes' Linear4bit on a CPU with AVX512-BF16, whatever CPU runs this test."""

    def __init__(self) -> None:
        super().__init__()
        self.support_avx512bf16_for_cpu = True


def test_layers_do_not_rearrange_their_weights_while_gradients_are_needed() -> None:
    model = nn.ModuleList([_Packable(), nn.Linear(2, 2)])
    with pytest.raises(KeyboardInterrupt), differentiable_4bit(model):
        assert model[0].support_avx512bf16_for_cpu is False
        raise KeyboardInterrupt
    assert model[0].support_avx512bf16_for_cpu is True


def test_a_rearranged_weight_is_put_back(base_path: Path) -> None:
    import bitsandbytes.functional as bnb

    base = load(base_path, "nf4").model.layers[0].mlp.up_proj
    with base_weight(base) as weight:
        before = weight.clone()
    base.weight.data, base.weight.quant_state = bnb._convert_weight_packed_for_cpu(
        base.weight.data, base.weight.quant_state
    )
    unpack_4bit(base)
    with base_weight(base) as weight:
        # the block scales went through bfloat16
        torch.testing.assert_close(weight, before, rtol=2**-8, atol=0)


def test_an_adapter_of_a_quantised_base_merges_into_the_full_one_without_a_false_alarm(
    base_path: Path, tmp_path: Path
) -> None:
    model = get_peft_model(load(base_path, "nf4"), DowserConfig(importance="magnitude"))
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other base weights.*")
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), tmp_path / "adapter")


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_trainer_with_an_8bit_optimizer(
    device: str, kind: str, optimizer: str, base_path: Path, tmp_path: Path
) -> None:
    """As QLoRA is run: prepared for training, checkpointed, the states in 8 bit (on a CPU never paged)."""
    base = prepare_model_for_kbit_training(load(base_path, kind, device))
    model = get_peft_model(base, DowserConfig(rho=0.6, **QUICK))  # bitsandbytes keeps small states in float32
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        optim=optimizer,
        max_steps=5,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trained = [layer.dowser_values["default"] for layer in dowser_layers(model).values()]
    states = trainer.optimizer.state
    assert len(states) == len(trained)
    for values in trained:
        moments = [states[values][name] for name in ("state1", "state2")]
        expected = torch.uint8 if values.numel() >= 4096 else torch.float32
        assert all(x.dtype == expected and x.numel() == values.numel() for x in moments)
        assert values.dtype == torch.float32
    assert any(values.numel() >= 4096 for values in trained)

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(load(base_path, kind, device), tmp_path / "adapter")
    options = {"input_ids": IDS[:1].to(device), "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    written = [each.eval().generate(**options) for each in (loaded, plain(model))]
    assert written[0].shape == (1, IDS.shape[1] + 6) and torch.equal(*written)


def plain(model: Any) -> Any:
    """The model without what prepare_model_for_kbit_training and the Trainer left on it."""
    model.gradient_checkpointing_disable()
    model.config.use_cache = True
    return model


@pytest.mark.parametrize("granularity", ["element", "column"])
@pytest.mark.parametrize("kind", ["nf4 double", "int8"])
def test_merging_into_the_dequantised_base(kind: str, granularity: Any, base_path: Path, tmp_path: Path) -> None:
    """What README shows: W + delta is kept as it is, not rounded to the grid of W, and loads in transformers."""
    model = get_peft_model(load(base_path, kind), DowserConfig(granularity=granularity, **QUICK))
    train(model, lr=0.01)
    model.eval().save_pretrained(tmp_path / "adapter")
    trained = model(IDS).logits.detach()
    expected = {}
    for name, layer in dowser_layers(model.get_base_model()).items():
        with base_weight(layer) as weight:
            expected[name] = weight.float() + layer.get_delta_weight("default").detach()
    quantised_again = model.merge_and_unload()

    base = load(base_path, kind)
    base.dequantize()
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload(safe_merge=True)
    assert {type(layer) for layer in merged.modules() if hasattr(layer, "in_features")} == {nn.Linear}
    for name, wanted in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), wanted, rtol=0, atol=1e-6)
        with base_weight(quantised_again.get_submodule(name)) as rounded:
            assert float((rounded.float() - wanted).abs().max()) > 1e-3
    if kind != "int8":  # which rounds the input of a layer as well, while it is quantised
        torch.testing.assert_close(
            merged(IDS).logits.detach(), trained, rtol=0, atol=1e-5 * float(trained.abs().max())
        )
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in loaded.config.to_dict()
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)
