"""The adapter in PEFT: creation, several adapters, mixed models, quantised bases, training."""

from __future__ import annotations

import gc
import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from dowser_peft import DowserConfig, ProbeStatistics, bitmask, importance, probe
from dowser_peft.probing.hooks import StatisticsHooks
from dowser_peft.scoring import num_trainable
from dowser_peft.tuner_layer import DowserLayer
from tests.models import (
    needs_peft_for_transformers,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llava,
    tiny_mlp,
    tiny_routed,
)

QUICK: dict[str, Any] = {"num_prompts": 4, "num_probes": 2, "prompt_length": 8}
IDS = torch.randint(6, 96, (2, 9), generator=torch.Generator().manual_seed(1))


def dowser_layers(model: nn.Module) -> dict[str, DowserLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DowserLayer)}


def train(model: nn.Module, steps: int = 3, lr: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_get_peft_model_end_to_end() -> None:
    base = tiny_llama()
    expected = base(IDS).logits
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, DowserConfig(rho=0.1, task_type="CAUSAL_LM", **QUICK))
    layers = dowser_layers(model)
    assert len(layers) == 2 * 7
    assert torch.equal(model(IDS).logits, expected)
    for layer in layers.values():
        k = num_trainable(layer.numel, 0.1)
        assert layer.dowser_values["default"].shape == (k,) == (bitmask.count(layer.dowser_mask["default"]),)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("dowser_values" in name for name in trainable)
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, parameter in model.get_base_model().named_parameters():
        if "dowser" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")])


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny_mlp(), DowserConfig(rho=0.1, importance="magnitude", target_modules="all-linear"))
    model.print_trainable_parameters()
    expected = sum(num_trainable(layer.numel, 0.1) for layer in dowser_layers(model).values())
    assert f"trainable params: {expected:,} " in capsys.readouterr().out


def test_masks_are_those_of_the_probe() -> None:
    """get_peft_model, and statistics passed as object or file, choose the same weights."""
    base = tiny_llama()
    names = list(dowser_layers(get_peft_model(tiny_llama(), DowserConfig(**QUICK))))
    statistics = probe(base, **QUICK, progress=False)
    automatic = dowser_layers(get_peft_model(tiny_llama(), DowserConfig(**QUICK)))
    explicit = dowser_layers(get_peft_model(tiny_llama(), DowserConfig(importance=statistics)))
    assert list(automatic) == list(explicit) == names
    for name in names:
        assert torch.equal(automatic[name].dowser_mask["default"], explicit[name].dowser_mask["default"])


def test_the_lowest_scores_train() -> None:
    base = tiny_llama()
    statistics = probe(base, **QUICK, progress=False)
    model = get_peft_model(base, DowserConfig(rho=0.25, importance=statistics))
    for name, layer in dowser_layers(model.get_base_model()).items():
        psi, a = statistics.sensitivity(name).float(), statistics.activation(name).float()
        score = (layer.get_base_layer().weight.abs() * (psi.T @ a)).view(-1)
        mask = bitmask.unpack(layer.dowser_mask["default"], layer.numel)
        assert score[mask].max() <= score[~mask].min()


def test_gpt2_conv1d() -> None:
    base = tiny_gpt2()
    expected = base(IDS).logits
    statistics = probe(base, **QUICK, progress=False)
    model = get_peft_model(base, DowserConfig(importance=statistics, fan_in_fan_out=True, task_type="CAUSAL_LM"))
    assert torch.equal(model(IDS).logits, expected)
    for name, layer in dowser_layers(model.get_base_model().base_model).items():
        psi, a = (statistics.sensitivity(f"transformer.{name}"), statistics.activation(f"transformer.{name}"))
        score = (layer.get_base_layer().weight.abs() * (a.float().T @ psi.float())).view(-1)  # stored [in, out]
        mask = bitmask.unpack(layer.dowser_mask["default"], layer.numel)
        assert score[mask].max() <= score[~mask].min()
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = model(IDS).logits
    assert torch.equal(model.merge_and_unload()(IDS).logits, trained)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_fan_in_fan_out_is_corrected_with_a_warning(fan_in_fan_out: bool) -> None:
    base = tiny_gpt2() if not fan_in_fan_out else tiny_llama()
    with pytest.warns(UserWarning, match=f"fan_in_fan_out is set to {fan_in_fan_out} but"):
        model = get_peft_model(base, DowserConfig(importance="magnitude", fan_in_fan_out=fan_in_fan_out))
    assert model.peft_config["default"].fan_in_fan_out is not fan_in_fan_out


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_cheap_importance_needs_no_forward_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mlp()
    monkeypatch.setattr(type(model), "forward", lambda self, x: pytest.fail("called"))
    get_peft_model(model, DowserConfig(importance=name, target_modules="all-linear"))


def test_importance_chooses_the_mask() -> None:
    masks = {}
    for name in ("dowser", "magnitude", "wanda", "random"):
        layers = dowser_layers(get_peft_model(tiny_llama(), DowserConfig(importance=name, rho=0.3, **QUICK)))
        masks[name] = {key: layer.dowser_mask["default"] for key, layer in layers.items()}
        for layer in layers.values():
            chosen = bitmask.unpack(layer.dowser_mask["default"], layer.numel)
            if name == "magnitude":
                size = layer.get_base_layer().weight.abs().view(-1)
                assert size[chosen].max() <= size[~chosen].min()
    for first, second in (("dowser", "magnitude"), ("dowser", "wanda"), ("magnitude", "random")):
        assert any(not torch.equal(masks[first][key], masks[second][key]) for key in masks[first])


def test_wanda_mask() -> None:
    base = tiny_llama()
    statistics = probe(base, **QUICK | {"num_probes": 1}, progress=False)
    model = get_peft_model(base, DowserConfig(importance="wanda", rho=0.3, **QUICK))
    for name, layer in dowser_layers(model.get_base_model()).items():
        score = (layer.get_base_layer().weight.abs() * statistics.activation(name).float().mean(0)).view(-1)
        mask = bitmask.unpack(layer.dowser_mask["default"], layer.numel)
        assert score[mask].max() <= score[~mask].min() * (1 + 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"num_prompts": 5},
        {"num_probes": 3},
        {"prompt_length": 9},
        {"temperature": 5.0},
        {"top_p": 0.2},
        {"repetition_penalty": 50.0},
        {"estimator": "mean_abs"},
        {"probe_tolerance": 0.5},
    ],
)
def test_every_setting_of_the_probe_reaches_it(options: dict[str, Any]) -> None:
    def masks(**changed: Any) -> list[torch.Tensor]:
        model = get_peft_model(tiny_llama(), DowserConfig(rho=0.3, **QUICK | changed))
        return [layer.dowser_mask["default"] for layer in dowser_layers(model).values()]

    assert any(not torch.equal(a, b) for a, b in zip(masks(), masks(**options), strict=True))


def test_probe_batch_size_reaches_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = importance.probe
    monkeypatch.setattr(importance, "probe", lambda *a, **k: seen.append(k["batch_size"]) or original(*a, **k))
    get_peft_model(tiny_llama(), DowserConfig(probe_batch_size=3, **QUICK))
    assert seen == [3]


def test_rho_pattern() -> None:
    config = DowserConfig(rho=0.1, rho_pattern={"q_proj": 0.5, r"layers\.1\.mlp\.\w+": 1.0}, importance="magnitude")
    for name, layer in dowser_layers(get_peft_model(tiny_llama(), config)).items():
        rho = 0.5 if name.endswith("q_proj") else 1.0 if "layers.1.mlp" in name else 0.1
        assert layer.dowser_values["default"].numel() == num_trainable(layer.numel, rho)


def test_rho_pattern_that_matches_nothing_warns() -> None:
    with pytest.warns(UserWarning, match=r"rho_pattern.*\['qproj'\]"):
        get_peft_model(tiny_llama(), DowserConfig(rho_pattern={"qproj": 0.5}, importance="magnitude"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, r".*layers\.\d\.self_attn\.(q|v)_proj"),
        ({"target_modules": r".*\.1\.mlp\.\w+_proj"}, r".*layers\.1\.mlp\.\w+_proj"),
        ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]}, r".*\.q_proj"),
        ({"exclude_modules": r".*mlp.*"}, r".*self_attn\.\w_proj"),
        ({"num_last_layers": 1}, r".*layers\.1\..*"),
        ({"num_last_layers": 1, "target_modules": ["q_proj"]}, r".*layers\.1\..*q_proj"),
        ({"layers_to_transform": [0]}, r".*layers\.0\..*"),
        ({"layers_to_transform": 1, "target_modules": ["o_proj"]}, r".*layers\.1\.self_attn\.o_proj"),
        (
            {"layers_to_transform": [0], "layers_pattern": "layers", "target_modules": ["o_proj"]},
            r".*layers\.0.*o_proj",
        ),
        ({"target_modules": "all-linear"}, r".*layers\.\d\..*_proj"),
    ],
)
def test_target_selection(options: dict[str, Any], expected: str) -> None:
    import re

    base = tiny_llama()
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name}
    model = get_peft_model(base, DowserConfig(importance="magnitude", **options))
    found = set(dowser_layers(model.get_base_model()))
    assert found == {name for name in linear if re.fullmatch(expected, name)} and found


def test_layers_pattern_says_in_which_list_layers_are_counted() -> None:
    """Without it PEFT counts in the outermost list."""
    found = {}
    for pattern in (None, "experts"):
        base = nn.ModuleDict({"model": tiny_routed()})
        options = {"layers_to_transform": [0], "layers_pattern": pattern, "target_modules": ["up"]}
        model = get_peft_model(base, DowserConfig(importance="magnitude", **options))
        found[pattern] = set(dowser_layers(model.get_base_model()))
    assert found[None] == {f"model.layers.0.experts.{expert}.up" for expert in range(4)}
    assert found["experts"] == {f"model.layers.{layer}.experts.0.up" for layer in range(2)}


def test_mllm_default_keeps_everything_but_the_decoder_frozen() -> None:
    model = get_peft_model(tiny_llava(), DowserConfig(**QUICK))
    names = list(dowser_layers(model))
    assert names and all("language_model.layers" in name for name in names)


@pytest.mark.parametrize("bias", ["none", "all", "dowser_only"])
def test_bias(bias: str) -> None:
    base = tiny_bert()
    model = get_peft_model(base, DowserConfig(bias=bias, importance="magnitude", target_modules=["query"]))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "dowser" not in n}
    biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    expected = {"none": set(), "all": biases, "dowser_only": {n for n in biases if ".query." in n}}[bias]
    assert trainable == expected


@pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
def test_a_container_that_is_saved_in_full_comes_back(end: str) -> None:
    config = DowserConfig(target_modules=["q_proj"], modules_to_save=["mlp"], importance="random", init_weights=False)
    model = get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(2)
    with model.disable_adapter() if end == "unload" else nullcontext():
        if end == "unload":  # which, as for PEFT's own methods, keeps what was saved in full
            for layer in model.base_model.model.model.layers:
                layer.mlp.enable_adapters(True)
        expected = model(IDS).logits
    plain = getattr(model, end)()
    assert torch.equal(plain(IDS).logits, expected)
    assert plain.state_dict().keys() == tiny_llama().state_dict().keys()


def test_modules_to_save(tmp_path: Any) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(modules_to_save=["lm_head"], importance="magnitude"))
    train(model)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(IDS).logits, expected)


def test_config_can_be_used_again() -> None:
    """As everywhere in PEFT the object stays the same; what marks a saved adapter appears only in the file."""
    config = DowserConfig(importance="magnitude")
    first = get_peft_model(tiny_llama(), config)
    assert first.peft_config["default"] is config and config.base_fingerprint is None
    other_base = tiny_llama()
    with torch.no_grad():
        for parameter in other_base.parameters():
            parameter.neg_()
    second = get_peft_model(other_base, config)
    assert not any(layer.is_waiting("default") for layer in dowser_layers(second).values())
    fingerprints = []
    for model in (first, second, first):  # each model saves its own
        get_peft_model_state_dict(model)
        fingerprints.append(config.to_dict()["base_fingerprint"])
    assert fingerprints[0] == fingerprints[2] != fingerprints[1] and all(fingerprints)


def test_a_failure_gives_the_config_back_as_it_was() -> None:
    config = DowserConfig(target_modules="all-linear", importance="dowser")
    with pytest.raises(ValueError, match="no synthetic inputs"):
        get_peft_model(tiny_mlp(), config)
    assert config == DowserConfig(target_modules="all-linear", importance="dowser")


def test_add_adapter_scores_the_base_not_the_first_adapter() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(rho=0.1, **QUICK))
    train(model, lr=0.1)
    before = model(IDS).logits
    model.add_adapter("second", DowserConfig(rho=0.2, **QUICK))
    assert torch.equal(model(IDS).logits, before)
    reference = dowser_layers(get_peft_model(tiny_llama(), DowserConfig(rho=0.2, **QUICK)))
    for name, layer in dowser_layers(model).items():
        assert torch.equal(layer.dowser_mask["second"], reference[name].dowser_mask["default"])
    model.set_adapter("second")
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(n.endswith("dowser_values.second") for n in trainable)
    model.delete_adapter("default")
    assert all(list(layer.dowser_values) == ["second"] for layer in dowser_layers(model).values())


def test_an_adapter_may_be_called_dowser() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the name is part of the prefix
        model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude"), adapter_name="dowser")
    losses = train(model)
    assert losses[-1] < losses[0]


def test_disable_and_merge_through_the_model() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude"))
    train(model, lr=0.1)
    trained, expected = model(IDS).logits, tiny_llama()(IDS).logits
    assert not torch.equal(trained, expected)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, expected)
    model.merge_adapter()
    assert torch.equal(model(IDS).logits, trained)
    model.unmerge_adapter()
    assert torch.equal(model.unload()(IDS).logits, expected)


def test_mixed_model_with_lora_on_other_layers() -> None:
    base = tiny_llama()
    expected = base(IDS).logits
    model = get_peft_model(base, DowserConfig(target_modules=["q_proj"], **QUICK), mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    model.add_adapter("more", DowserConfig(target_modules=["o_proj"], **QUICK))
    assert torch.equal(model(IDS).logits, expected)
    model.set_adapter(["default", "lora", "more"])
    assert not torch.allclose(model(IDS).logits, expected)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-2] for n in trainable} == {"dowser_values", "lora"} or any("lora_" in n for n in trainable)
    train(model)
    active = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, active, rtol=1e-4, atol=1e-5)


def test_mixed_model_with_lora_first() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["up_proj"]), mixed=True)
    model.add_adapter("dowser_part", DowserConfig(target_modules=["q_proj"], importance="magnitude"))
    assert len(dowser_layers(model)) == 2


def test_low_level_injection() -> None:
    model = inject_adapter_in_model(DowserConfig(**QUICK), tiny_llama())
    assert len(dowser_layers(model)) == 14
    losses = train(model)
    assert losses[-1] < losses[0]


@needs_peft_for_transformers
def test_transformers_add_adapter() -> None:
    model = tiny_llama()
    expected = model(IDS).logits
    model.add_adapter(DowserConfig(**QUICK), adapter_name="mine")
    assert len(dowser_layers(model)) == 14
    assert torch.equal(model(IDS).logits, expected)
    losses = train(model)
    assert losses[-1] < losses[0]
    model.delete_adapter("mine")
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_adapter_dtype_follows_peft(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    config = DowserConfig(importance="magnitude")
    model = get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    for layer in dowser_layers(model).values():
        assert layer.dowser_values["default"].dtype == expected
        assert layer.dowser_mask["default"].dtype == torch.uint8
    if expected == torch.float32:  # Adam's epsilon is zero in float16
        losses = train(model)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude")).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [layer.dowser_values["default"].grad for layer in dowser_layers(model).values()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)


# Bad input


def test_no_module_matched_lists_near_misses() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"similar names: \['q_proj'"):
        get_peft_model(tiny_llama(), DowserConfig(target_modules=["q_prj"], importance="magnitude"))


def test_unsupported_module_names_it_and_what_is_supported() -> None:
    config = DowserConfig(target_modules=["embed_tokens"], importance="magnitude")
    with pytest.raises(TypeError, match=r"'model\.embed_tokens' of type torch.*Embedding is not supported.*Linear"):
        get_peft_model(tiny_llama(), config)


def test_nothing_is_replaced_when_one_target_is_unsupported() -> None:
    base = tiny_llama()
    with pytest.raises(TypeError):
        get_peft_model(base, DowserConfig(target_modules=["q_proj", "embed_tokens"], importance="magnitude"))
    assert not dowser_layers(base)
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_layer_with_another_adapter() -> None:
    base = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).get_base_model()
    config = DowserConfig(target_modules=["q_proj"], importance="magnitude")
    with pytest.raises(TypeError, match=r"already carries an adapter \(peft\.tuners\.lora"):
        get_peft_model(base, config)


def test_weights_on_the_meta_device() -> None:
    with torch.device("meta"):
        base = tiny_mlp()
    with pytest.raises(ValueError, match="has its weight on the meta device, so it cannot be scored"):
        get_peft_model(base, DowserConfig(importance="magnitude", target_modules="all-linear"))


def test_rho_so_small_that_a_layer_would_get_no_weight() -> None:
    with pytest.warns(
        UserWarning, match=r"leaves no trainable weight in 14 of 14 modules, such as '.*q_proj' \(256 weights\): one"
    ):
        model = get_peft_model(tiny_llama(), DowserConfig(rho=1e-4, importance="magnitude"))
    assert all(layer.dowser_values["default"].numel() == 1 for layer in dowser_layers(model).values())


def test_a_plain_module_without_data_names_the_alternatives() -> None:
    with pytest.raises(ValueError, match=r"probe\(model, batches=\.\.\.\).*importance='magnitude'"):
        get_peft_model(tiny_mlp(), DowserConfig(target_modules="all-linear"))


def test_no_default_targets() -> None:
    with pytest.raises(ValueError, match="target_modules is not set and .* Please specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(3, 3)).requires_grad_(), DowserConfig(importance="magnitude"))


def test_interrupted_probing_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_llama().train()

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StatisticsHooks, "take_batch", interrupt)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(base, DowserConfig(**QUICK))
    assert not dowser_layers(base) and not hasattr(base, "peft_config")
    assert all(module.training for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_interrupted_add_adapter_keeps_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(**QUICK))
    train(model)
    expected = model(IDS).logits

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StatisticsHooks, "take_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.add_adapter("second", DowserConfig(**QUICK))
    monkeypatch.undo()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(IDS).logits, expected)
    assert train(model, steps=1)


def test_tied_embeddings_are_reported_as_in_peft() -> None:
    base = tiny_llama(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        get_peft_model(base, DowserConfig(target_modules=["q_proj", "lm_head"], importance="magnitude"))


def test_task_type_classes() -> None:
    model = get_peft_model(tiny_bert(), DowserConfig(task_type=TaskType.FEATURE_EXTRACTION, **QUICK))
    assert type(model).__name__ == "PeftModelForFeatureExtraction"


def test_statistics_from_a_file_of_the_same_base_raise_no_alarm(tmp_path: Any) -> None:
    base = tiny_llama(num_hidden_layers=11)  # layers 2 and 10 sort differently as names and as numbers
    statistics = probe(base, **QUICK, progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    assert ProbeStatistics.load(tmp_path / "statistics.safetensors").module_names == statistics.module_names
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other base weights.*")
        get_peft_model(base, DowserConfig(importance=tmp_path / "statistics.safetensors"))


def test_statistics_of_other_weights_raise_an_alarm(tmp_path: Any) -> None:
    probe(tiny_llama(), **QUICK, progress=False).save(tmp_path / "statistics.safetensors")
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    with pytest.warns(UserWarning, match="statistics were taken on other base weights"):
        get_peft_model(other, DowserConfig(importance=tmp_path / "statistics.safetensors"))


# What adversarial testing found


def test_a_discarded_model_is_freed() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude"))
    model(IDS)
    layer = weakref.ref(next(iter(dowser_layers(model).values())))
    weight = weakref.ref(layer().get_base_layer().weight)
    del model
    gc.collect()
    assert layer() is None and weight() is None


def test_an_offloaded_base_trains() -> None:
    base = tiny_llama()
    expected = base(IDS).logits
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = get_peft_model(base, DowserConfig(**QUICK))
    reference = get_peft_model(tiny_llama(), DowserConfig(**QUICK))
    for ours, plain in zip(dowser_layers(model).values(), dowser_layers(reference).values(), strict=True):
        assert ours.dowser_values["default"].device.type == "cpu"
        assert torch.equal(ours.dowser_mask["default"], plain.dowser_mask["default"])
        assert ours.get_base_layer().weight.device.type == "meta"
    assert torch.equal(model(IDS).logits, expected)
    assert train(model) == train(reference)
    assert all(layer.get_base_layer().weight.device.type == "meta" for layer in dowser_layers(model).values())


class _Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5


@pytest.mark.parametrize("kind", ["own forward", "float8"])
def test_a_linear_layer_that_computes_something_else_is_refused(kind: str) -> None:
    layer = _Scaled(4, 4) if kind == "own forward" else nn.Linear(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(
        TypeError, match=r"'0' of type .* is not supported: it computes more than x W\^T \+ b, or stores"
    ):
        get_peft_model(nn.Sequential(layer), DowserConfig(importance="random", target_modules=["0"]))


def test_a_layer_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="'0' has no weights"):
        get_peft_model(nn.Sequential(nn.Linear(0, 4)), DowserConfig(importance="random", target_modules=["0"]))


class _EndsAlike(nn.Module):
    """A decoder whose path is the ending of that of a vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))


@pytest.mark.parametrize("options", [{}, {"num_last_layers": 1}])
def test_default_targets_are_matched_exactly(options: dict[str, Any], tmp_path: Any) -> None:
    model = get_peft_model(_EndsAlike(), DowserConfig(importance="random", **options))
    expected = {"layers.0.q", "layers.1.q"} if not options else {"layers.1.q"}
    assert set(dowser_layers(model.get_base_model())) == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_EndsAlike(), tmp_path)
    assert set(dowser_layers(loaded.get_base_model())) == expected


@pytest.mark.parametrize("name", ["v1.0", "", "keys", "pop"])
def test_a_name_that_cannot_be_one_is_refused_before_anything_happens(name: str) -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="random"))
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        model.add_adapter(name, DowserConfig(**QUICK))
    model.set_adapter("default")
    assert list(model.peft_config) == ["default"] and train(model)


@pytest.mark.parametrize("is_second", [False, True])
def test_a_failure_in_the_middle_of_injection_is_undone(is_second: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_llama()
    if is_second:
        model = get_peft_model(model, DowserConfig(importance="magnitude"))
    before = [(name, type(module)) for name, module in model.named_modules()]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    update_layer, calls = DowserLayer.update_layer, []

    def out_of_memory(self: DowserLayer, *args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        update_layer(self, *args, **options)

    monkeypatch.setattr(DowserLayer, "update_layer", out_of_memory)
    with pytest.raises(MemoryError):
        if is_second:
            model.add_adapter("second", DowserConfig(importance="random"))
        else:
            get_peft_model(model, DowserConfig(importance="random"))
    monkeypatch.undo()
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert all(list(layer.dowser_values) == ["default"] for layer in dowser_layers(model).values())


def test_a_new_adapter_is_scored_on_the_base_even_if_another_is_merged() -> None:
    def masks(merge: bool) -> list[torch.Tensor]:
        model = get_peft_model(tiny_llama(), DowserConfig(importance="magnitude"))
        train(model, lr=0.3)
        if merge:
            model.merge_adapter()
            with pytest.warns(UserWarning, match="Unmerging the merged adapters"):
                model.add_adapter("second", DowserConfig(importance="magnitude"))
        else:
            model.add_adapter("second", DowserConfig(importance="magnitude"))
        return [layer.dowser_mask["second"] for layer in dowser_layers(model).values()]

    assert all(torch.equal(a, b) for a, b in zip(masks(False), masks(True), strict=True))


def test_a_config_with_default_targets_serves_a_deeper_model() -> None:
    config = DowserConfig(importance="random")
    get_peft_model(tiny_llama(), config)
    assert len(dowser_layers(get_peft_model(tiny_llama(num_hidden_layers=4), config))) == 4 * 7
    assert dowser_layers(get_peft_model(tiny_bert(), config))


def test_one_adapter_per_row_is_refused() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="random"))
    with pytest.raises(ValueError, match="adapter_names: one batch with a different adapter per row"):
        model(IDS, adapter_names=["default", "default"])


def test_positions_found_in_inference_mode_serve_training() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(importance="random"))
    with torch.inference_mode():
        model(IDS)
    assert train(model)
    next(iter(dowser_layers(model).values())).get_delta_weight("default").sum().backward()


def test_a_probe_does_not_depend_on_the_callers_autocast() -> None:
    plain = probe(tiny_llama(), **QUICK, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = probe(tiny_llama(), **QUICK, progress=False)
    assert all(torch.equal(plain.sensitivity(name), inside.sensitivity(name)) for name in plain.module_names)


def test_a_string_that_was_meant_as_a_name_is_explained() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=r"pass a list, target_modules=\['q_proj'\]"):
        get_peft_model(tiny_llama(), DowserConfig(importance="random", target_modules="q_proj"))


def test_statistics_have_a_short_repr() -> None:
    assert len(repr(DowserConfig(importance=probe(tiny_llama(), **QUICK, progress=False)))) < 2000


def test_wrapping_a_model_twice_says_what_to_do() -> None:
    model = get_peft_model(tiny_llama(), DowserConfig(**QUICK))
    with pytest.raises(ValueError, match=r"already has an adapter: add another one with model\.add_adapter"):
        get_peft_model(model, DowserConfig(**QUICK))


def test_targets_that_share_a_weight_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share one weight"):
        get_peft_model(model, DowserConfig(importance="random", target_modules=["0", "1"]))
    assert dowser_layers(get_peft_model(model, DowserConfig(importance="random", target_modules=["0"])))
