"""``DowserConfig(granularity="column")`` through PEFT: creation, training, files, several adapters, other bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from dowser_peft import DowserConfig, importance, probe
from dowser_peft.base_layer import base_weight
from dowser_peft.column_layer import ColumnLinear
from dowser_peft.scoring import num_trainable
from tests.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_llava, tiny_mlp
from tests.test_column_layer import Opaque
from tests.test_loading import PATHS, assert_unchanged, cut_values, drop_values, edit, snapshot, truncate
from tests.test_model import IDS, QUICK, dowser_layers, train
from tests.test_quantised import SIZES, load
from tests.test_trainer import train as train_with_trainer
from tests.test_trainer import values

COLUMN: dict[str, Any] = {"granularity": "column", "rho": 0.2}
PROBED = COLUMN | QUICK
MAGNITUDE = COLUMN | {"importance": "magnitude"}


def test_end_to_end() -> None:
    base = tiny_llama()
    expected = base(IDS).logits
    model = get_peft_model(base, DowserConfig(task_type="CAUSAL_LM", **PROBED))
    layers = dowser_layers(model)
    assert len(layers) == 14 and all(isinstance(layer, ColumnLinear) for layer in layers.values())
    assert torch.equal(model(IDS).logits, expected)
    for layer in layers.values():
        k = num_trainable(layer.in_features, 0.2)
        assert layer.dowser_values["default"].shape == (layer.out_features, k)
        assert layer.dowser_columns["default"].shape == (k,)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("dowser_values" in name for name in trainable)
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = model(IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, trained, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(IDS).logits, trained)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dowser", "wanda", "magnitude", "random", "statistics"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_columns_of_lowest_summed_importance_train(name: str, build: Callable[..., nn.Module]) -> None:
    base = build()
    statistics = probe(base, **QUICK | ({"num_probes": 1} if name == "wanda" else {}), progress=False)
    chosen = statistics if name == "statistics" else name
    config = DowserConfig(importance=chosen, fan_in_fan_out=build is tiny_gpt2, **PROBED)
    for module, layer in dowser_layers(get_peft_model(base, config).get_base_model()).items():
        columns = layer.dowser_columns["default"].long()
        assert columns.tolist() == sorted(set(columns.tolist()))
        assert len(columns) == num_trainable(layer.in_features, 0.2)
        if name == "random":
            continue
        weight = layer.get_base_layer().weight.detach()
        S = (weight.T if build is tiny_gpt2 else weight).abs().double()
        a, psi = statistics.activation(module).double(), statistics.sensitivity(module).double()
        if name == "wanda":
            S = S * a.mean(0)
        elif name != "magnitude":
            S = S * (psi.T @ a)
        score = S.sum(0)
        others = torch.ones(len(score), dtype=torch.bool)
        others[columns] = False
        assert score[columns].max() <= score[others].min() * (1 + 1e-6)


def test_random_columns_follow_the_seed_and_need_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Sequential, "forward", lambda self, x: pytest.fail("called"))

    def columns(seed: int) -> list[list[int]]:
        config = DowserConfig(importance="random", seed=seed, target_modules="all-linear", **COLUMN | {"rho": 0.5})
        model = get_peft_model(tiny_mlp(), config)
        return [layer.dowser_columns["default"].tolist() for layer in dowser_layers(model).values()]

    assert columns(0) == columns(0) != columns(1)


def test_rho_pattern_depth_and_too_small_a_rho() -> None:
    config = DowserConfig(rho_pattern={"q_proj": 0.5}, num_last_layers=1, **MAGNITUDE)
    layers = dowser_layers(get_peft_model(tiny_llama(), config))
    assert len(layers) == 7
    for name, layer in layers.items():
        assert layer.dowser_columns["default"].numel() == (
            8 if "q_proj" in name else num_trainable(layer.in_features, 0.2)
        )
    with pytest.warns(
        UserWarning, match=r"no trainable column in 14 of 14 modules, .*\(16 columns\): one column trains"
    ):
        get_peft_model(tiny_llama(), DowserConfig(**MAGNITUDE | {"rho": 0.01}))


@pytest.mark.parametrize("bias", ["all", "dowser_only"])
def test_bias_and_modules_to_save(bias: str, tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_bert(), DowserConfig(bias=bias, target_modules=["query"], modules_to_save=["classifier"], **MAGNITUDE)
    )
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(name.endswith("query.base_layer.bias") for name in moved) and any(
        "classifier" in name for name in moved
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_bert(), tmp_path)(IDS).logits, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = get_peft_model(tiny_llama(), DowserConfig(**MAGNITUDE)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [layer.dowser_values["default"].grad for layer in dowser_layers(model).values()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


# Several adapters


def test_add_set_and_delete_adapters(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(**PROBED))
    train(model, lr=0.1)
    outputs = {"default": model(IDS).logits}
    model.add_adapter("second", DowserConfig(**PROBED | {"rho": 0.4}))
    assert torch.equal(model(IDS).logits, outputs["default"])
    reference = dowser_layers(get_peft_model(tiny_llama(), DowserConfig(**PROBED | {"rho": 0.4})))
    for name, layer in dowser_layers(model).items():  # scored on the base, not on the first adapter
        assert torch.equal(layer.dowser_columns["second"], reference[name].dowser_columns["default"])
    model.set_adapter("second")
    train(model, lr=0.1)
    outputs["second"] = model(IDS).logits
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS).logits
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "other")
    for name, original in (("default", "default"), ("other", "second")):
        loaded.set_adapter(name)
        assert torch.equal(loaded(IDS).logits, outputs[original])
    model.delete_adapter("default")
    assert all(list(layer.dowser_columns) == ["second"] for layer in dowser_layers(model).values())


@pytest.mark.parametrize("first", ["element", "column"])
def test_both_granularities_on_one_layer_are_refused_before_anything_happens(first: str) -> None:
    second = "column" if first == "element" else "element"
    model = get_peft_model(
        tiny_llama(), DowserConfig(importance="magnitude", granularity=first, target_modules=["q_proj"])
    )
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=f"'model.layers.0.self_attn.q_proj' has an adapter with granularity='{first}'"
    ):
        model.add_adapter("second", DowserConfig(granularity=second, target_modules=["q_proj"], **QUICK))
    assert_unchanged(model, before)
    model.add_adapter(
        "elsewhere", DowserConfig(granularity=second, target_modules=["up_proj"], importance="magnitude")
    )
    model.base_model.set_adapter(["default", "elsewhere"])
    losses = train(model)
    assert losses[-1] < losses[0]


def test_mixed_model_with_lora_on_other_layers() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(target_modules=["q_proj"], **PROBED), mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    train(model)
    active = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, active, rtol=1e-4, atol=1e-5)


# Files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, DowserConfig(task_type="CAUSAL_LM", **PROBED))
    train(model, lr=0.1)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model(IDS).logits, tmp_path / "expected.pt")
    return tmp_path / "adapter"


@pytest.mark.parametrize("path", PATHS)
def test_loads_without_probing_and_gives_the_same_bits(
    path: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "probe", lambda *args, **options: pytest.fail("probed"))
    monkeypatch.setattr("dowser_peft.model.select_masks", lambda *args: pytest.fail("scored"))
    model = PATHS[path](saved)
    assert torch.equal(model(IDS).logits, torch.load(saved.parent / "expected.pt"))
    if "trainable" in path:
        losses = train(model)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 4.01), ("bfloat16", 2.01)])
def test_bytes_per_trained_weight(dtype: str, limit: float, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512))
    config = DowserConfig(target_modules="all-linear", save_dtype=dtype, **MAGNITUDE)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size / trained <= limit


def test_the_file_holds_values_and_ids_and_the_card_speaks_of_columns(saved: Path) -> None:
    file = load_file(saved / "adapter_model.safetensors")
    assert len(file) == 2 * 14
    for key, tensor in file.items():
        assert tensor.dtype == (torch.float32 if key.endswith(".dowser_values") else torch.int32)
        assert key.endswith((".dowser_values", ".dowser_columns"))
    assert json.loads((saved / "adapter_config.json").read_text())["granularity"] == "column"
    assert "rho = 0.2 of each target layer's input columns, those" in (saved / "README.md").read_text()


def test_hot_reload_into_other_columns(saved: Path) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(**COLUMN, importance="random"))
    model(IDS)
    set_peft_model_state_dict(model, load_file(saved / "adapter_model.safetensors"))
    assert torch.equal(model(IDS).logits, torch.load(saved.parent / "expected.pt"))


def columns_changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(tensors: dict[str, torch.Tensor], key: str) -> None:
        tensors[f"{key}columns"] = change(tensors[f"{key}columns"]).contiguous()

    return edit(damage)


def drop_columns(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[f"{key}columns"]


def flat_values(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[f"{key}values"] = tensors[f"{key}values"].view(-1)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "adapter file .* is truncated or corrupted"),
    "cut values": (edit(cut_values), r"size mismatch, the file has 15 x 5 trained weights, this model takes 16 x 5"),
    "flat values": (edit(flat_values), r"damaged, its values are torch.float32 of shape"),
    "no values": (edit(drop_values), "the file has no values for it"),
    "no columns": (edit(drop_columns), "the file has no columns for it"),
    "cut columns": (columns_changed(lambda c: c[:-1]), r"has the ids of \d+ columns for values of \d+"),
    "out of range": (columns_changed(lambda c: c + 24), "damaged, its columns include .* not one of 24 inputs"),
    "negative": (columns_changed(lambda c: c - 24), "damaged, its columns include -"),
    "not ascending": (columns_changed(lambda c: c.flip(0)), "damaged, its columns are not in ascending order"),
    "twice": (columns_changed(lambda c: c[:1].repeat(len(c))), "damaged, its columns are not in ascending order"),
    "another dtype": (columns_changed(lambda c: c.float()), "damaged, its columns are torch.float32 of shape"),
    "a matrix": (columns_changed(lambda c: c[None]), "damaged, its columns are torch.int32 of shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("second", [False, True])
def test_a_broken_file_changes_nothing(damage: str, second: bool, saved: Path) -> None:
    damage_file, message = DAMAGES[damage]
    damage_file(saved / "adapter_model.safetensors")
    model: Any = get_peft_model(tiny_llama(), DowserConfig(**MAGNITUDE)) if second else tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(saved, "broken") if second else PeftModel.from_pretrained(model, saved)
    assert_unchanged(model, before)


def test_a_layer_whose_module_was_missing_stays_as_in_the_base(saved: Path, tmp_path: Path) -> None:
    def drop_both(tensors: dict[str, torch.Tensor], key: str) -> None:
        drop_values(tensors, key)
        drop_columns(tensors, key)

    edit(drop_both)(saved / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing"):
        model = PeftModel.from_pretrained(tiny_llama(), saved)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="the file has no columns, so this module stays as in the base"):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    assert torch.equal(again(IDS).logits, expected)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(**PROBED))
    train_with_trainer(model, tmp_path / "whole", 6)
    train_with_trainer(get_peft_model(tiny_llama(), DowserConfig(**PROBED)), tmp_path / "cut", 3)
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    resumed = PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    train_with_trainer(resumed, tmp_path / "cut", 6, resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(resumed), strict=True))


# Other bases


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str, tmp_path: Path) -> None:
    tiny_llama(**SIZES).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", kind)
    expected = base(IDS).logits.detach()
    statistics = probe(base, **QUICK, progress=False)
    model = get_peft_model(base, DowserConfig(importance=statistics, **COLUMN))
    layers = dowser_layers(model)
    for name, layer in dowser_layers(model.get_base_model()).items():
        with base_weight(layer) as weight:
            factors = statistics.sensitivity(name).double().T @ statistics.activation(name).double()
            score = (weight.abs().double() * factors).sum(0)
        columns = layer.dowser_columns["default"].long()
        assert score[columns].max() <= score.sort().values[len(columns) - 1] * (1 + 1e-9)
    assert torch.equal(model(IDS).logits, expected)  # the base computes as it does without an adapter
    losses = train(model, lr=0.03)
    assert losses[-1] < losses[0]
    model.eval()
    trained = model(IDS).logits.detach()
    stored = {name: layer.get_base_layer().weight.data.clone() for name, layer in layers.items()}
    model.merge_adapter(safe_merge=True)
    assert float((model(IDS).logits - trained).detach().abs().max()) < float((trained - expected).abs().max())
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight.data, stored[name]) for name, layer in layers.items())
    assert torch.equal(model(IDS).logits, trained)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        PeftModel.from_pretrained(load(tmp_path / "base", kind), tmp_path / "adapter")(IDS).logits, trained
    )


def test_an_offloaded_base() -> None:
    base = tiny_llama()
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = get_peft_model(base, DowserConfig(**PROBED))
    reference = get_peft_model(tiny_llama(), DowserConfig(**PROBED))
    for ours, plain in zip(dowser_layers(model).values(), dowser_layers(reference).values(), strict=True):
        assert torch.equal(ours.dowser_columns["default"], plain.dowser_columns["default"])
    assert train(model) == train(reference)


def test_a_base_whose_weight_cannot_be_read(tmp_path: Path) -> None:
    """Selection by the weight is refused; random columns, or columns chosen elsewhere, train."""

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Opaque(), nn.Tanh(), nn.Linear(12, 3))

    x = torch.randn(4, 10)
    for name in ("dowser", "magnitude"):
        model = base()
        before = snapshot(model)
        with pytest.raises(
            ValueError, match="'0' of type .*Opaque cannot be scored.*importance='random'.*unquantised"
        ):
            get_peft_model(model, DowserConfig(target_modules=["0"], **COLUMN | {"importance": name}))
        assert_unchanged(model, before)
    with pytest.raises(TypeError, match="'0' of type .*Opaque is not supported"):
        get_peft_model(base(), DowserConfig(target_modules=["0"], importance="random"))
    model = get_peft_model(base(), DowserConfig(target_modules=["0"], importance="random", **COLUMN))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = model(x).square().sum()
    first.backward()
    optimizer.step()
    assert model(x).square().sum() < first
    with pytest.raises(ValueError, match="cannot merge into a Opaque"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "random")
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "random")(x), model(x))

    full = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3))
    get_peft_model(full, DowserConfig(target_modules=["0"], **MAGNITUDE)).save_pretrained(tmp_path / "chosen")
    model = PeftModel.from_pretrained(base(), tmp_path / "chosen", is_trainable=True)
    model(x).sum().backward()
    assert dowser_layers(model)["base_model.model.0"].dowser_values["default"].grad.any()


def test_an_fp8_weight() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="cannot be scored"):
        get_peft_model(nn.Sequential(layer), DowserConfig(target_modules=["0"], **MAGNITUDE))
    model = get_peft_model(nn.Sequential(layer), DowserConfig(target_modules=["0"], importance="random", **COLUMN))
    assert next(iter(dowser_layers(model).values())).dowser_values["default"].dtype == torch.float32


def test_something_that_maps_no_features_is_refused() -> None:
    with pytest.raises(TypeError, match="it is not a linear layer, and has no `in_features`"):
        get_peft_model(tiny_llama(), DowserConfig(target_modules=["embed_tokens"], **MAGNITUDE))


def test_mllm_round_trip(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llava(), DowserConfig(**PROBED))
    assert all("language_model.layers" in name for name in dowser_layers(model))
    train(model, lr=0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llava(), tmp_path)(IDS).logits, model(IDS).logits)


def test_bad_granularity() -> None:
    with pytest.raises(ValueError, match=r"granularity must be one of \('element', 'column'\), got 'row'"):
        DowserConfig(granularity="row")
