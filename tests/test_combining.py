"""``add_weighted_adapter``: combinations of sparse deltas, against PEFT's functions on dense deltas."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils
from torch import nn

from dowser_peft import DowserConfig, importance
from tests.models import tiny_gpt2, tiny_llama
from tests.test_model import IDS, dowser_layers, train

WEIGHTS = [0.7, -0.4]
BOTH = pytest.mark.parametrize("granularity", ["element", "column"])


def two_adapters(base: nn.Module | None = None, **options: Any) -> Any:
    """A model with adapters "one" and "two" in different places, with values as if both had been trained."""
    options = {"importance": "random", "rho": 0.2, **options}
    model = get_peft_model(base or tiny_llama(), DowserConfig(**options), adapter_name="one")
    model.add_adapter("two", DowserConfig(**{**options, "seed": 1}))
    generator = torch.Generator().manual_seed(2)
    for layer in dowser_layers(model).values():
        for values in layer.dowser_values.values():
            values.data.copy_(0.1 * torch.randn(values.shape, generator=generator))
    return model.eval()


def deltas(model: nn.Module, *names: str) -> dict[str, list[torch.Tensor]]:
    return {
        module: [layer.get_delta_weight(name).detach() for name in names]
        for module, layer in dowser_layers(model).items()
    }


@BOTH
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_linear_is_the_weighted_sum_of_the_dense_deltas(granularity: str, build: Callable[[], nn.Module]) -> None:
    model = two_adapters(build(), granularity=granularity, fan_in_fan_out=build is tiny_gpt2)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both")
    weights = torch.tensor(WEIGHTS)
    for one, two, both in deltas(model, "one", "two", "both").values():
        assert torch.equal(both, merge_utils.task_arithmetic([one, two], weights))
    for layer in dowser_layers(model).values():
        assert layer.dowser_values["both"].numel() < layer.numel / 2  # the union, not the whole weight
        assert layer.dowser_values["both"].dtype == torch.float32


@BOTH
@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("combination_type", ["ties", "magnitude_prune"])
def test_pruned_combinations_equal_those_of_dense_deltas(granularity: str, combination_type: str, method: Any) -> None:
    model = two_adapters(granularity=granularity)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both", combination_type, 0.3, method)
    names = {module: layer.dowser_values["one"].numel() for module, layer in dowser_layers(model).items()}
    options = (method,) if combination_type == "ties" else ()
    for module, (one, two, both) in deltas(model, "one", "two", "both").items():
        density = (int(0.3 * names[module]) + 0.5) / one.numel()  # keeps as many of the dense delta
        expected = getattr(merge_utils, combination_type)([one, two], torch.tensor(WEIGHTS), density, *options)
        assert torch.equal(both, expected)
        assert both.count_nonzero() < one.count_nonzero() + two.count_nonzero()


@pytest.mark.parametrize("combination_type", ["dare_linear", "dare_ties"])
def test_random_pruning_is_that_of_peft(combination_type: Any) -> None:
    """In one place, the values are combined as PEFT combines dense tensors, with the same random numbers."""
    model = two_adapters(importance="magnitude")
    torch.manual_seed(5)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both", combination_type, density=0.5)
    torch.manual_seed(5)
    for layer in dowser_layers(model).values():
        values = [layer.dowser_values[name].detach() for name in ("one", "two")]
        expected = getattr(merge_utils, combination_type)(values, torch.tensor(WEIGHTS), 0.5)
        assert torch.equal(layer.dowser_values["both"], expected)
        assert torch.equal(layer.dowser_mask["both"], layer.dowser_mask["one"])


@BOTH
def test_a_combination_saves_loads_trains_and_merges(granularity: str, tmp_path: Path, monkeypatch) -> None:
    model = two_adapters(granularity=granularity, target_modules=["q_proj", "down_proj"])
    model.add_adapter("three", DowserConfig(importance="random", rho=0.3, granularity=granularity, seed=3))
    model.add_weighted_adapter(["one", "two", "three"], [0.5, 1.0, 2.0], "all")
    model.set_adapter("all")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path, selected_adapters=["all"])
    config = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert config["base_fingerprint"] and len(config["rho_pattern"]) == 14
    monkeypatch.setattr(importance, "probe", lambda *_, **__: pytest.fail("a saved adapter was probed"))

    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "all", **options)
        assert torch.equal(loaded(IDS).logits, expected)
    losses = train(loaded)
    assert losses[-1] < losses[0]
    native = tiny_llama()
    native.load_adapter(str(tmp_path / "all"))
    assert torch.equal(native(IDS).logits, expected)
    merged = PeftModel.from_pretrained(tiny_llama(), tmp_path / "all").merge_and_unload()
    if granularity == "element":
        assert torch.equal(merged(IDS).logits, expected)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_even_sizes_need_no_rho_pattern() -> None:
    model = two_adapters(importance="magnitude")
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both")
    assert model.peft_config["both"].rho_pattern == {} and model.peft_config["both"].rho == pytest.approx(0.2, 0.01)


def test_a_module_of_one_adapter_gets_its_share_alone() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude", target_modules=["q_proj"]))
    model.add_adapter("other", DowserConfig(importance="magnitude", target_modules=["v_proj"]))
    for layer in dowser_layers(model).values():
        for values in layer.dowser_values.values():
            nn.init.normal_(values)
    model.add_weighted_adapter(["default", "other"], [0.5, 3.0], "both")
    layers = dowser_layers(model)
    assert len(layers) == 4 and all("both" in layer.dowser_values for layer in layers.values())
    for name, layer in layers.items():
        owner, weight = ("default", 0.5) if name.endswith("q_proj") else ("other", 3.0)
        assert torch.equal(layer.dowser_values["both"], weight * layer.dowser_values[owner])
        assert torch.equal(layer.dowser_mask["both"], layer.dowser_mask[owner])
        assert layer.dowser_mask["both"].data_ptr() != layer.dowser_mask[owner].data_ptr()  # may be overwritten


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_not_rounded_to_a_half_precision_base(dtype: torch.dtype) -> None:
    model = two_adapters(tiny_llama().to(dtype))
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "both")
    for one, two, both in deltas(model, "one", "two", "both").values():
        assert torch.equal(both, merge_utils.task_arithmetic([one, two], torch.tensor(WEIGHTS)))
        assert not torch.equal(both, both.to(dtype).float())


def test_what_trains_and_what_is_active_stays(tmp_path: Path) -> None:
    model = two_adapters()
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = model(IDS).logits
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "both")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
    assert model.active_adapters == ["one"] and torch.equal(model(IDS).logits, expected)
    model.set_adapter("both")
    assert train(model)  # a combination may be trained further
    model.delete_adapter("one")
    model.delete_adapter("two")
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["one", "none"], WEIGHTS, "both"), "Adapter none does not exist; there are"),
        ((["one", "two"], WEIGHTS, "both", "svd"), "Invalid combination_type: svd; for Dowser it is one of"),
        ((["one", "two"], [1.0], "both"), "2 adapters take as many weights, got 1"),
        ((["one", "two"], [1.0, float("nan")], "both"), "weights must be finite, got .*nan"),
        (([], [], "both"), "adapters is empty"),
        ((["one", "two"], WEIGHTS, "two"), "there already is an adapter 'two'"),
        ((["one", "two"], WEIGHTS, "both", "ties"), r"'ties' needs density, .* got None"),
        ((["one", "two"], WEIGHTS, "both", "dare_ties", 1.5), r"in \[0, 1\]; got 1.5"),
        ((["one", "two"], WEIGHTS, "both", "ties", 0.5, "most"), "majority_sign_method must be one of"),
    ],
)
def test_arguments_that_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    model = two_adapters()
    state = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert model.state_dict().keys() == state and list(model.peft_config) == ["one", "two"]


def test_adapters_that_are_refused() -> None:
    magnitude: dict[str, Any] = {"importance": "magnitude", "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), DowserConfig(**magnitude))
    model.add_adapter("columns", DowserConfig(importance="magnitude", target_modules=["v_proj"], granularity="column"))
    model.add_adapter("head", DowserConfig(**magnitude, modules_to_save=["lm_head"]))
    for other, message in (("columns", r"different granularity.*\['column', 'element'\]"), ("head", r"\['lm_head'\]")):
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(["default", other], WEIGHTS, "both")
    model = get_peft_model(tiny_llama(), DowserConfig(**magnitude, bias="all"))
    with pytest.raises(ValueError, match="bias='all'"):
        model.add_weighted_adapter(["default"], [1.0], "both")


def test_adapters_of_different_bases_raise_an_alarm(tmp_path: Path) -> None:
    other = tiny_llama()
    for parameter in other.parameters():
        parameter.data.neg_()
    two_adapters(other).save_pretrained(tmp_path)
    model = two_adapters()
    with pytest.warns(UserWarning, match="trained on other base weights"):
        model.load_adapter(tmp_path / "two", "other")
    with pytest.warns(UserWarning, match="'one' and 'other' were trained on different base weights"):
        model.add_weighted_adapter(["one", "other"], WEIGHTS, "both")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "same")


def test_an_adapter_that_was_never_loaded_is_refused() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude", inference_mode=True))
    with pytest.raises(ValueError, match="nothing to combine.*or none was loaded"):
        model.add_weighted_adapter(["default"], [1.0], "both")
