"""Several adapters on one base in memory: switched merged and unmerged, replaced from files, in chains of tasks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

from dowser_peft import DowserConfig, probe
from dowser_peft.fingerprint import base_fingerprint
from tests.models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen2
from tests.test_loading import assert_unchanged, snapshot, truncate
from tests.test_model import IDS, QUICK, dowser_layers, train

NAMES = ("one", "two", "three")
CONFIGS: dict[str, dict[str, Any]] = {"one": {"seed": 1}, "two": {"seed": 2}, "three": {"seed": 3, "rho": 0.3}}


def model_with(*names: str, base: Any = None, **options: Any) -> Any:
    """A model with these adapters, each in other places, with values as if it had been trained."""
    model: Any = None
    base = tiny_llama() if base is None else base
    for name in names:
        config = DowserConfig(importance="random", **{**CONFIGS[name], **options})
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for layer in dowser_layers(model).values():
        for name, values in layer.dowser_values.items():
            generator = torch.Generator().manual_seed(10 * CONFIGS[name]["seed"])
            values.data.copy_(0.1 * torch.randn(values.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["element", "column"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_merged_adapters_are_switched_without_a_trace(build: Any, granularity: str, dtype: torch.dtype) -> None:
    options = {"granularity": granularity, "fan_in_fan_out": build is tiny_gpt2}
    base = build().to(dtype)
    expected = {name: answer(model_with(name, base=build().to(dtype), **options).merge_and_unload()) for name in NAMES}
    original = {name: parameter.clone() for name, parameter in base.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    model = model_with(*NAMES, base=base, **options)
    for name in ("one", "two", "three", "two", "one"):
        model.merge_adapter([name])
        assert torch.equal(answer(model), expected[name])
        model.unmerge_adapter()
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter, original[name]) and parameter.data_ptr() == places[name]


@pytest.mark.parametrize("granularity", ["element", "column"])
def test_an_adapter_takes_the_place_of_another_in_memory(granularity: str, tmp_path: Path) -> None:
    """PEFT's load_adapter with the name of an adapter that is there: values and places are overwritten in place."""
    for name in NAMES:
        model_with(name, granularity=granularity).save_pretrained(tmp_path)  # into a folder of that name
    expected = {name: answer(model_with(name, granularity=granularity)) for name in NAMES}
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if "dowser_" in name}
    for name in ("two", "one", "two"):
        model.load_adapter(tmp_path / name, "default")
        assert torch.equal(answer(model), expected[name])
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items() if "dowser_" in name} == before
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="size mismatch.*another rho"):
        model.load_adapter(tmp_path / "three", "default")
    assert_unchanged(model, unchanged)


def test_a_broken_file_does_not_replace_an_adapter(tmp_path: Path) -> None:
    model = model_with("one")
    model.save_pretrained(tmp_path)
    truncate(tmp_path / "one" / "adapter_model.safetensors")
    unchanged = snapshot(model)
    with pytest.raises(Exception, match="incomplete|truncated|corrupted|invalid"):
        model.load_adapter(tmp_path / "one", "one")
    assert_unchanged(model, unchanged)


def test_a_file_that_trains_more_does_not_reach_the_base(tmp_path: Path) -> None:
    other = model_with("two", base=tiny_qwen2(), modules_to_save=["lm_head"])
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lm_head.modules_to_save" in name:
                parameter.add_(1)
    other.save_pretrained(tmp_path)
    model = model_with("one", base=tiny_qwen2())
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="'one': the file has .*lm_head"):
        model.load_adapter(tmp_path / "two", "one")
    assert_unchanged(model, unchanged)
    same = model_with("one", base=tiny_qwen2(), modules_to_save=["lm_head"])  # an adapter that trains it too
    same.load_adapter(tmp_path / "two", "one")
    assert torch.equal(answer(same), answer(other))


def test_biases_of_a_file_reach_the_base_with_a_warning(tmp_path: Path) -> None:
    """PEFT writes them there whatever the configuration says, and has a test that relies on it."""
    other = model_with("two", base=tiny_qwen2(), bias="all")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(1)
    other.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'one': the file has .* trained biases.*written into the base model"):
        model_with("one", base=tiny_qwen2()).load_adapter(tmp_path / "two", "one")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "adapter 'one'", UserWarning)
        same = model_with("one", base=tiny_qwen2(), bias="all")
        same.load_adapter(tmp_path / "two", "one")
    assert torch.equal(answer(same), answer(other))


def test_a_replaced_adapter_does_not_keep_the_fingerprint_of_the_old(tmp_path: Path) -> None:
    model = model_with("one")
    model.save_pretrained(tmp_path)
    model_with("two").save_pretrained(tmp_path)
    recorded = {name: layer.base_fingerprint["one"] for name, layer in dowser_layers(model).items()}
    assert None not in recorded.values()
    model.load_adapter(tmp_path / "one", "one")  # itself, as in resuming
    assert {name: layer.base_fingerprint["one"] for name, layer in dowser_layers(model).items()} == recorded
    model.load_adapter(tmp_path / "two", "one")
    model.save_pretrained(tmp_path / "again")
    assert DowserConfig.from_pretrained(tmp_path / "again" / "one").base_fingerprint is None


@pytest.mark.parametrize("change", ["merge_adapter", "unmerge_adapter"])
@pytest.mark.parametrize(
    ("build", "options"),
    [(tiny_llama, {}), (tiny_llama, {"granularity": "column"}), (tiny_mixtral, {"target_parameters": ["down_proj"]})],
)
def test_no_gradients_through_weights_that_were_merged_in_between(build: Any, options: Any, change: str) -> None:
    model = model_with("one", base=build(), target_modules=["q_proj", "v_proj"], **options).train()
    if change == "unmerge_adapter":
        model.merge_adapter()
        model.get_input_embeddings().weight.requires_grad_()
    loss = model(IDS).logits.square().mean()
    getattr(model, change)()
    with pytest.raises(RuntimeError, match="between the forward and the backward pass|modified by an inplace"):
        loss.backward()


def test_a_file_of_fewer_modules_is_not_mixed_with_the_old(tmp_path: Path) -> None:
    model_with("two", target_modules=["q_proj"]).save_pretrained(tmp_path)
    model = model_with("one", target_modules=["q_proj", "v_proj"])
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="'one', module .*v_proj': the file has nothing for it"):
        model.load_adapter(tmp_path / "two", "one")
    assert_unchanged(model, unchanged)


@pytest.mark.parametrize("granularity", ["element", "column"])
def test_a_merge_that_fails_half_way_is_undone(granularity: str) -> None:
    model = model_with("one", "two", granularity=granularity)
    *_, last = dowser_layers(model).values()
    last.dowser_values["two"].data.fill_(float("nan"))
    model.merge_adapter(["one"])
    merged = {name: value.clone() for name, value in model.state_dict().items() if "dowser_" not in name}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["two"], safe_merge=True)
    assert all(layer.merged_adapters == ["one"] for layer in dowser_layers(model).values())
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items() if name in merged)


def test_a_merged_adapter_is_not_replaced_behind_its_back(tmp_path: Path) -> None:
    model_with("two").save_pretrained(tmp_path)
    model = model_with("one")
    original = answer(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="'one' is merged into the base.*unmerge_adapter"):
        model.load_adapter(tmp_path / "two", "one")
    assert torch.equal(answer(model), original)
    model.unmerge_adapter()
    model.load_adapter(tmp_path / "two", "one")
    assert torch.equal(answer(model), answer(model_with("two")))


def test_hotswap_of_peft_is_for_lora_alone(tmp_path: Path) -> None:
    """README says to use load_adapter; if this fails, PEFT has opened its function to other methods."""
    model_with("two").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but DOWSER"):
        hotswap_adapter(model_with("one"), str(tmp_path / "two"), adapter_name="one", torch_device="cpu")


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    model_with("two").save_pretrained(tmp_path)
    model = model_with("one")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    answer(compiled)
    model.load_adapter(tmp_path / "two", "one")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = answer(compiled)
    torch.testing.assert_close(found, answer(model_with("two")), rtol=1e-5, atol=1e-5)


def test_a_chain_of_tasks(tmp_path: Path) -> None:
    """Train, merge, probe what was merged, train next: the second adapter is chosen on the merged weights."""
    base = tiny_llama()
    first = probe(base, progress=False, **QUICK)
    model: Any = get_peft_model(base, DowserConfig(importance=first, rho=0.3))
    train(model, steps=5, lr=0.1)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    model = get_peft_model(merged, DowserConfig(**QUICK))  # probes the merged weights

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    second = probe(fresh, progress=False, **QUICK)
    assert second.fingerprint != first.fingerprint
    expected = get_peft_model(fresh, DowserConfig(importance=second))
    with pytest.warns(UserWarning, match="statistics were taken on other base weights"):
        stale = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), DowserConfig(importance=first)
        )
    for name, layer in dowser_layers(model).items():
        module = name.removeprefix("base_model.model.")
        assert not torch.equal(second.sensitivity(module), first.sensitivity(module))
        assert torch.equal(layer.dowser_mask["default"], dowser_layers(expected)[name].dowser_mask["default"])
    masks = [[layer.dowser_mask["default"] for layer in dowser_layers(found).values()] for found in (model, stale)]
    assert not all(map(torch.equal, *masks))

    losses = train(model)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "second")
    modules = {name: module.get_base_layer() for name, module in dowser_layers(model).items()}
    assert model.peft_config["default"].to_dict()["base_fingerprint"] == base_fingerprint(modules)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "second")
    assert torch.equal(answer(loaded), answer(model))
    with pytest.warns(UserWarning, match="trained on other base weights"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
