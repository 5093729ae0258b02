"""Saving and loading on every path: never probes, gives back the same bits, and fails without a trace."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from dowser_peft import DowserConfig, bitmask, importance, model_probe, probe
from dowser_peft.model_card import complete_model_card
from dowser_peft.tuner_layer import DowserLayer
from tests.models import needs_peft_for_transformers, tiny_bert, tiny_llama, tiny_llava
from tests.test_model import IDS, QUICK, dowser_layers, train


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path: Path, base_path: Path) -> Path:
    """A trained adapter on disk, whose base model is on disk too."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_path)
    model = get_peft_model(base, DowserConfig(task_type="CAUSAL_LM", **QUICK))
    train(model, lr=0.1)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model(IDS).logits, tmp_path / "expected.pt")
    return tmp_path / "adapter"


def expected_logits(saved: Path) -> torch.Tensor:
    return torch.load(saved.parent / "expected.pt")


@pytest.fixture
def never_probe(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # after the adapter has been made
    def probed(*args: Any, **kwargs: Any) -> None:
        pytest.fail("an adapter that is being loaded was probed or scored")

    monkeypatch.setattr(importance, "probe", probed)
    monkeypatch.setattr(model_probe, "collect_statistics", probed)
    monkeypatch.setattr(importance, "bottom_rho_mask", probed)
    monkeypatch.setattr("dowser_peft.model.select_masks", probed)


def from_pretrained(saved: Path, **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(tiny_llama(), saved, **options)


def load_adapter(saved: Path, **options: Any) -> nn.Module:
    """A second adapter on a model that has one."""
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    model.load_adapter(saved, "second", **options)
    model.set_adapter("second")
    return model


def native(saved: Path, **options: Any) -> nn.Module:
    model = tiny_llama()
    model.load_adapter(str(saved), **options)
    return model


def auto(saved: Path, **options: Any) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(saved, **options)


def with_config(saved: Path, **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(tiny_llama(), saved, config=PeftConfig.from_pretrained(saved), **options)


PATHS: dict[str, Callable[[Path], nn.Module]] = {
    "from_pretrained": from_pretrained,
    "from_pretrained(is_trainable)": lambda saved: from_pretrained(saved, is_trainable=True),
    "from_pretrained(low_cpu_mem_usage)": lambda saved: from_pretrained(saved, low_cpu_mem_usage=True),
    "from_pretrained(trainable, low_cpu_mem_usage)": lambda saved: from_pretrained(
        saved, low_cpu_mem_usage=True, is_trainable=True
    ),
    "from_pretrained(config)": with_config,
    "from_pretrained(config, is_trainable)": lambda saved: with_config(saved, is_trainable=True),
    "load_adapter": load_adapter,
    "load_adapter(is_trainable)": lambda saved: load_adapter(saved, is_trainable=True),
    "load_adapter(low_cpu_mem_usage)": lambda saved: load_adapter(saved, low_cpu_mem_usage=True),
    "transformers load_adapter": native,
    "transformers load_adapter(is_trainable)": lambda saved: native(saved, is_trainable=True),
    "AutoPeftModel": auto,
    "AutoPeftModel(is_trainable)": lambda saved: auto(saved, is_trainable=True),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("never_probe")
def test_loads_without_probing_and_gives_the_same_bits(path: str, saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        model = PATHS[path](saved)
    assert torch.equal(model(IDS).logits, expected_logits(saved))
    layers = dowser_layers(model)
    assert all(
        layer.dowser_values[name].dtype == torch.float32 for layer in layers.values() for name in layer.dowser_values
    )
    if "trainable" in path:
        losses = train(model)
        assert losses[-1] < losses[0]


@pytest.mark.usefixtures("never_probe")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_float32_values_are_not_rounded_through_a_half_precision_base(
    saved: Path, dtype: torch.dtype, low_cpu_mem_usage: bool
) -> None:
    model = PeftModel.from_pretrained(tiny_llama().to(dtype), saved, low_cpu_mem_usage=low_cpu_mem_usage)
    file = load_file(saved / "adapter_model.safetensors")
    for name, layer in dowser_layers(model).items():
        assert torch.equal(layer.dowser_values["default"], file[f"{name}.dowser_values"])


def test_fresh_process_with_only_the_import(saved: Path) -> None:
    script = f"""
import torch, dowser_peft
torch.set_num_threads(1)  # as here: the number of threads changes the order of sums
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(saved)!r})
ids = torch.load({str(saved.parent / "ids.pt")!r})
assert torch.equal(model(ids).logits, torch.load({str(saved.parent / "expected.pt")!r}))
print(type(model).__name__)
"""
    torch.save(IDS, saved.parent / "ids.pt")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "PeftModelForCausalLM"


def test_bytes_per_trained_weight(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512))
    for dtype, limit in (("float32", 5.3), ("bfloat16", 3.3)):
        config = DowserConfig(importance="magnitude", target_modules="all-linear", rho=0.1, save_dtype=dtype)
        model = get_peft_model(nn.Sequential(*(nn.Linear(m.in_features, m.out_features) for m in base)), config)
        model.save_pretrained(tmp_path / dtype)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size = (tmp_path / dtype / "adapter_model.safetensors").stat().st_size
        assert size / trained <= limit


def test_save_dtype_bfloat16_rounds_the_file_not_the_model(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(save_dtype="bfloat16", **QUICK))
    train(model, lr=0.1)
    values = {name: layer.dowser_values["default"].clone() for name, layer in dowser_layers(model).items()}
    model.save_pretrained(tmp_path)
    loaded = dowser_layers(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    for name, layer in dowser_layers(model).items():
        assert torch.equal(layer.dowser_values["default"], values[name])
        assert torch.equal(loaded[name].dowser_values["default"], values[name].bfloat16().float())


def test_saved_config_says_what_it_was_made_for(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["peft_type"] == "DOWSER" and config["base_fingerprint"]
    assert config["rho"] == 0.1 and config["inference_mode"] is True


def test_adapter_file_is_plain_safetensors(saved: Path) -> None:
    file = load_file(saved / "adapter_model.safetensors")
    assert len(file) == 2 * 14
    for key, value in file.items():
        assert key.endswith((".dowser_values", ".dowser_mask"))
        assert value.dtype == (torch.float32 if key.endswith("values") else torch.uint8)


def test_several_adapters_save_and_load(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(**QUICK), adapter_name="first")
    model.add_adapter("second", DowserConfig(rho=0.3, **QUICK))
    outputs = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        train(model, lr=0.1)
        outputs[name] = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second", adapter_name="renamed")
    loaded.load_adapter(tmp_path / "first", "other")
    for name, original in (("renamed", "second"), ("other", "first")):
        loaded.set_adapter(name)
        assert torch.equal(loaded(IDS).logits, outputs[original])
    loaded.base_model.set_adapter(["renamed", "other"])
    assert not torch.equal(loaded(IDS).logits, outputs["first"])


@needs_peft_for_transformers
def test_transformers_save_and_load(tmp_path: Path) -> None:
    model = tiny_llama()
    model.add_adapter(DowserConfig(**QUICK))
    train(model, lr=0.1)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    fresh = tiny_llama()
    fresh.load_adapter(str(tmp_path))
    assert torch.equal(fresh(IDS).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(IDS).logits, expected)


def test_mllm_round_trip(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llava(), DowserConfig(**QUICK))
    train(model, lr=0.1)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llava(), tmp_path)(IDS).logits, expected)
    native = tiny_llava()
    native.load_adapter(str(tmp_path))
    assert torch.equal(native(IDS).logits, expected)


def test_hot_reload_of_values(saved: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), saved, is_trainable=True)
    state = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    train(model, lr=0.1)
    assert not torch.equal(model(IDS).logits, expected_logits(saved))
    set_peft_model_state_dict(model, state)
    assert torch.equal(model(IDS).logits, expected_logits(saved))
    values_only = {key: value for key, value in state.items() if key.endswith("values")}
    train(model, lr=0.1)
    set_peft_model_state_dict(model, values_only)
    assert torch.equal(model(IDS).logits, expected_logits(saved))


def test_hot_reload_into_another_mask(saved: Path) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="random"))
    model(IDS)  # positions are cached by now
    set_peft_model_state_dict(model, load_file(saved / "adapter_model.safetensors"))
    assert torch.equal(model(IDS).logits, expected_logits(saved))


def test_a_saved_config_used_for_a_new_adapter_refuses_to_train(saved: Path) -> None:
    config = PeftConfig.from_pretrained(saved)
    config.inference_mode = False
    model = get_peft_model(tiny_llama(), config)
    with pytest.raises(RuntimeError, match="mask has not been loaded.*is_trainable=True"):
        train(model)
    set_peft_model_state_dict(model, load_file(saved / "adapter_model.safetensors"))
    assert train(model)


def test_merged_model_needs_nothing_of_this_package(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(tiny_llama(), saved).merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not dowser_layers(merged)
    assert torch.equal(merged(IDS).logits, expected_logits(saved))


def test_model_card_tells_how_to_load(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: " in card and "- dowser\n" in card
    assert "import dowser_peft" in card and "KeyError: 'DOWSER'" in card and "rho = 0.1" in card
    written_by_hand = card.replace("import dowser_peft", "import something")
    (saved / "README.md").write_text(written_by_hand)
    DowserConfig.from_pretrained(saved).save_pretrained(saved)
    assert (saved / "README.md").read_text() == written_by_hand


def facts_of(card: str) -> dict[str, str]:
    return {line.split("|")[1].strip(): line.split("|")[2].strip() for line in card.splitlines() if line[:2] == "| "}


def test_model_card_tells_what_was_trained(tmp_path: Path) -> None:
    """Twice the facts of the run that was saved last, and what a person wrote around them."""
    model = get_peft_model(tiny_llama(), DowserConfig(**QUICK, rho_pattern={"q_proj": 0.5}, seed=3))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    facts, config = facts_of(card), DowserConfig.from_pretrained(tmp_path)
    assert facts["fingerprint of its adapted weights"] == f"`{config.base_fingerprint}`"
    assert facts["rho"] == f"{config.rho:g} of each target layer's weights (granularity `element`)"
    assert facts["rho of `q_proj`"] == "0.5" and facts["seed"] == "3" and facts["importance"] == "`dowser`"
    assert facts["prompts"] == f"N = {config.num_prompts} of {config.prompt_length} tokens"
    assert facts["probes"] == f"R = {config.num_probes} per prompt, estimator `rms`"
    values = sum(p.numel() for name, p in model.named_parameters() if ".dowser_values." in name)
    assert facts["trained weights"] == f"{values:,}"
    (tmp_path / "README.md").write_text(card + "\nBy hand.\n")
    report = {"dataset": "d", "split": "test", "examples": 2, "tokens": 1234}
    report |= {"base": {"loss": 1.5, "accuracy": 0.5}, "tuned": {"loss": 1.25, "accuracy": 0.625}}
    complete_model_card(tmp_path, config.to_dict(), report)
    with_report = (tmp_path / "README.md").read_text()
    assert with_report.endswith("By hand.\n") and with_report.count("## The Dowser adapter") == 1
    assert "Retention on `d`, split `test`: 2 examples, 1,234 tokens." in with_report
    assert "| loss | 1.5000 | 1.2500 | -0.2500 |\n| next-token accuracy | 0.5000 | 0.6250 | +0.1250 |" in with_report
    model.save_pretrained(tmp_path)  # other values: what was measured before does not hold for them
    assert "Retention" not in (tmp_path / "README.md").read_text()


def test_model_card_of_scores_without_a_probe(tmp_path: Path) -> None:
    config = DowserConfig(importance="magnitude", granularity="column", revision="abc")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    facts = facts_of((tmp_path / "README.md").read_text())
    assert facts["rho"] == "0.1 of each target layer's input columns (granularity `column`)"
    assert facts["importance"] == "`magnitude`" and not {"prompts", "probes", "seed"} & facts.keys()
    assert facts["base model"].endswith(", revision `abc`")


def test_the_saved_config_tells_how_the_statistics_were_made(tmp_path: Path) -> None:
    statistics = probe(tiny_llama(), num_prompts=3, num_probes=2, prompt_length=5, seed=7, progress=False)
    get_peft_model(tiny_llama(), DowserConfig(importance=statistics)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["num_prompts"], config["num_probes"], config["prompt_length"], config["seed"]) == (3, 2, 5, 7)


def test_the_saved_config_tells_where_a_probe_ended(tmp_path: Path) -> None:
    config = DowserConfig(num_prompts=20, num_probes=2, prompt_length=5, probe_tolerance=0.9)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["num_prompts"], saved["num_probes"], saved["probe_tolerance"]) == (16, 1, 0.9)
    assert (config.num_prompts, config.num_probes) == (20, 2)  # a reused config probes as it was asked to


# Broken files: nothing is half-loaded


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "configs": list(getattr(model, "peft_config", {})),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, old_state = after.pop("state"), before.pop("state")
    assert after == before
    assert state.keys() == old_state.keys()
    assert all(torch.equal(state[name], old_state[name]) for name in state)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def garbage(path: Path) -> None:
    path.write_bytes(b"this is not a safetensors file at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def edit(change: Callable[[dict[str, torch.Tensor], str], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors, next(key for key in tensors if key.endswith("dowser_values")).removesuffix("values"))
        save_file(tensors, path)

    return damage


def cut_values(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}values"] = tensors[f"{key}values"][:-1].clone()


def cut_mask(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}mask"] = tensors[f"{key}mask"][:-1].clone()


def flip_bits(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}mask"] = ~tensors[f"{key}mask"]


def drop_mask(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[f"{key}mask"]


def drop_values(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[f"{key}values"]


DAMAGES = {
    "truncated": (truncate, "adapter file .* is truncated or corrupted"),
    "garbage": (garbage, "adapter file .* is truncated or corrupted"),
    "empty": (empty, "adapter file .* is truncated or corrupted"),
    "cut values": (edit(cut_values), r"size mismatch, the file has \d+ trained weights, this model takes \d+"),
    "cut mask": (edit(cut_mask), "size mismatch, the file has a mask of .* The adapter belongs to another base"),
    "flipped bits": (edit(flip_bits), r"the file is damaged, its mask marks \d+ weights for \d+ values"),
    "no mask": (edit(drop_mask), "the file has no mask for it"),
    "no values": (edit(drop_values), "the file has no values for it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_from_pretrained_of_a_broken_file(damage: str, saved: Path) -> None:
    damage_file, message = DAMAGES[damage]
    damage_file(saved / "adapter_model.safetensors")
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert_unchanged(base, before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_adapter_of_a_broken_file(damage: str, saved: Path, tmp_path: Path) -> None:
    damage_file, message = DAMAGES[damage]
    model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude"))
    before = snapshot(model)
    damage_file(saved / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved, "broken")
    assert_unchanged(model, before)
    assert train(model)


def test_hot_reload_of_a_broken_state_keeps_the_adapter(saved: Path) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    before = snapshot(model)
    state = load_file(saved / "adapter_model.safetensors")
    cut_values(state, next(key for key in state if key.endswith("dowser_values")).removesuffix("values"))
    with pytest.raises(ValueError, match="size mismatch"):
        set_peft_model_state_dict(model, state)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:this adapter was trained on other base weights")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "size mismatch.* belongs to another base model"),
        ({"num_hidden_layers": 1}, "14 of 28 tensors in the file have no counterpart in this model"),
    ],
)
def test_an_adapter_of_another_architecture(options: dict[str, int], message: str, saved: Path) -> None:
    base = tiny_llama(**options)
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert_unchanged(base, before)


def test_an_adapter_of_other_modules(saved: Path) -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        PeftModel.from_pretrained(tiny_bert(), saved)


def test_an_adapter_of_another_revision_warns_with_both_fingerprints(saved: Path) -> None:
    base = tiny_llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter))
    fingerprint = json.loads((saved / "adapter_config.json").read_text())["base_fingerprint"]
    with pytest.warns(UserWarning, match=f"fingerprint {fingerprint}; this model has [0-9a-f]{{16}}"):
        PeftModel.from_pretrained(base, saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_dtype_is_not_another_revision(saved: Path, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other base weights.*")
        PeftModel.from_pretrained(tiny_llama().to(dtype), saved)


def test_a_full_disk_leaves_the_old_adapter(saved: Path) -> None:
    script = f"""
import resource, signal, torch, dowser_peft
from peft import PeftModel
from tests.models import tiny_llama
model = PeftModel.from_pretrained(tiny_llama(), {str(saved)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as a full disk does: writing fails half-way
try:
    model.save_pretrained({str(saved)!r})
except Exception as error:
    print(error)
"""
    before = {path.name: path.read_bytes() for path in saved.iterdir() if path.suffix in (".json", ".safetensors")}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "File too large" in result.stdout, result.stderr
    after = {path.name: path.read_bytes() for path in saved.iterdir() if path.suffix in (".json", ".safetensors")}
    assert after == before


def test_loading_checks_masks_against_the_layer() -> None:
    """Every bit set past the end of the layer, or a count that does not fit, is found before loading."""
    layer = next(iter(dowser_layers(get_peft_model(tiny_llama(), DowserConfig(importance="random"))).values()))
    assert isinstance(layer, DowserLayer)
    assert bitmask.count(layer.dowser_mask["default"]) == layer.dowser_values["default"].numel()


def test_a_layer_whose_module_was_missing_stays_as_in_the_base(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("dowser_values")).removesuffix("values")
    partial = {name: value for name, value in tensors.items() if not name.startswith(key)}
    save_file(partial, saved / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing"):
        model = PeftModel.from_pretrained(tiny_llama(), saved)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="has an empty mask, so this module stays as in the base"):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    assert torch.equal(again(IDS).logits, expected)
    assert torch.equal(model.merge_and_unload()(IDS).logits, expected)


def wrong_mask_dtype(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}mask"] = tensors[f"{key}mask"].float()


def wrong_values_shape(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}values"] = tensors[f"{key}values"][None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_mask_dtype, "damaged, its mask is torch.float32 of shape"),
        (wrong_values_shape, "damaged, its values are torch.float32 of shape"),
    ],
)
def test_tensors_of_the_wrong_kind(change: Callable[[Any, str], None], message: str, saved: Path) -> None:
    edit(change)(saved / "adapter_model.safetensors")
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, saved)
    assert_unchanged(base, before)
