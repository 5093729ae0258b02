"""Fused experts in PEFT: which parameters, which weights of each expert, saving, loading, other adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from torch import nn

from dowser_peft import DowserConfig, ProbeStatistics, bitmask, probe
from dowser_peft.exchange import export_shira
from dowser_peft.experts_layer import Experts, FusedExperts
from dowser_peft.fingerprint import base_fingerprint
from dowser_peft.fused_experts import expert_name, fused_weights, layers_named
from dowser_peft.importance import select_masks
from dowser_peft.scoring import num_trainable
from dowser_peft.targets import default_parameters, default_targets
from dowser_peft.tuner_layer import layers_with
from tests import models
from tests.architectures import EXPERTS, MIXTRAL, in_layers
from tests.test_experts_layer import expert_layers
from tests.test_model import IDS, dowser_layers, train

QUICK: dict[str, Any] = {"num_prompts": 4, "num_probes": 2, "prompt_length": 8}
PARAMETERS = in_layers("model.layers", EXPERTS)
pytestmark = pytest.mark.filterwarnings("ignore:no prompt reached", "ignore:.*they are no linear layers")


def adapted_names(model: PeftModel) -> set[str]:
    return set(dowser_layers(model.get_base_model()))


def random_adapter(**options: Any) -> PeftModel:
    return get_peft_model(models.tiny_mixtral(), DowserConfig(importance="random", **options))


@pytest.mark.parametrize("build", [models.tiny_mixtral, models.tiny_gpt_oss, models.tiny_qwen2_moe])
@pytest.mark.parametrize("rho", [0.1, 0.25])
def test_each_expert_trains_its_own_lowest_scores(build: Any, rho: float) -> None:
    """By brute force, from the stored statistics."""
    model = build()
    statistics = probe(model, **QUICK, progress=False)
    masks = select_masks(model, DowserConfig(importance=statistics, rho=rho), default_parameters(model))
    for name, weight in fused_weights(model):
        marked = bitmask.unpack(masks[name], weight.parameter.numel()).view(weight.parameter.shape)
        k = num_trainable(weight.rows * weight.columns, rho)
        assert marked.flatten(1).sum(1).tolist() == [k] * weight.num_experts
        for index in range(weight.num_experts):
            part = expert_name(name, index)
            score = statistics.sensitivity(part).float().T @ statistics.activation(part).float()  # [out, in]
            if not bool(score.any()):
                score = torch.ones_like(score)
            matrix = weight.parameter[index].detach().abs()
            score = score * (matrix.T if weight.is_transposed else matrix)
            chosen = marked[index].T if weight.is_transposed else marked[index]
            assert float(score[chosen].max()) <= float(score[~chosen].min()) * (1 + 1e-5)


def test_experts_that_no_prompt_reaches_are_ranked_by_magnitude() -> None:
    model = models.tiny_mixtral()
    for layer in model.model.layers:  # the router never chooses the last expert
        gate = layer.mlp.gate
        gate.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
        gate.weight.data[3] = -10.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, DowserConfig(num_prompts=16, num_probes=1, prompt_length=16, rho=0.2))
    messages = [str(warning.message) for warning in caught if "no prompt reached" in str(warning.message)]
    assert len(messages) == 1
    assert (
        "no prompt reached 4 of 24 modules and experts, such as 'model.layers.0.mlp.experts.gate_up_proj.3'"
        in messages[0]
    )
    for layer in expert_layers(adapted).values():
        base = layer.get_base_layer()
        marked = bitmask.unpack(layer.dowser_mask["default"], layer.numel).view(base.parameter.shape)
        magnitude = base.parameter.detach().abs()
        assert float(magnitude[3][marked[3]].max()) <= float(magnitude[3][~marked[3]].min())
        assert float(magnitude[0][marked[0]].max()) > float(magnitude[0][~marked[0]].min())
    # and a task that does not use it either moves nothing in it
    adapted.train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    for layer in expert_layers(adapted).values():
        of_last = layer.dowser_values["default"].grad.view(4, -1)[3]
        assert not bool(of_last.any()) and bool(layer.dowser_values["default"].grad.any())


@pytest.mark.parametrize("importance", ["magnitude", "random", "wanda"])
def test_other_importance(importance: str) -> None:
    model = get_peft_model(models.tiny_mixtral(), DowserConfig(importance=importance, rho=0.2, **QUICK))
    assert adapted_names(model) == in_layers("model.layers", MIXTRAL) | PARAMETERS
    per_expert = set()
    for layer in expert_layers(model).values():
        base = layer.get_base_layer()
        marked = bitmask.unpack(layer.dowser_mask["default"], layer.numel).view(base.num_experts, -1)
        assert marked.sum(1).tolist() == [num_trainable(base.rows * base.columns, 0.2)] * 4
        per_expert |= {tuple(row.tolist()) for row in marked}
        if importance == "magnitude":
            magnitude = base.parameter.detach().abs().flatten(1)
            for index in range(4):
                assert magnitude[index][marked[index]].max() <= magnitude[index][~marked[index]].min()
    assert len(per_expert) == 16  # no two experts have the same mask


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, in_layers("model.layers", MIXTRAL) | PARAMETERS),
        ({"target_parameters": []}, in_layers("model.layers", MIXTRAL)),
        ({"target_modules": ["q_proj"]}, in_layers("model.layers", {"self_attn.q_proj"})),
        ({"target_modules": "all-linear"}, in_layers("model.layers", MIXTRAL)),
        (
            {"target_modules": [], "target_parameters": ["down_proj"]},
            in_layers("model.layers", {"mlp.experts.down_proj"}),
        ),
        (
            {"target_parameters": ["experts.down_proj"]},
            in_layers("model.layers", MIXTRAL | {"mlp.experts.down_proj"}),
        ),
        (
            {"target_modules": ["v_proj"], "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
            in_layers("model.layers", {"self_attn.v_proj"}) | {"model.layers.1.mlp.experts.gate_up_proj"},
        ),
        ({"exclude_modules": ["experts"]}, in_layers("model.layers", MIXTRAL)),
        ({"exclude_modules": r".*experts.*"}, in_layers("model.layers", MIXTRAL)),
        ({"exclude_modules": ["down_proj"]}, in_layers("model.layers", MIXTRAL | {"mlp.experts.gate_up_proj"})),
        (
            {"exclude_modules": ["gate_up_proj", "k_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
            in_layers("model.layers", MIXTRAL - {"self_attn.k_proj"} | {"mlp.experts.down_proj"}),
        ),
        ({"num_last_layers": 1}, in_layers("model.layers", MIXTRAL | EXPERTS, [1])),
        (
            {"num_last_layers": 1, "target_modules": [], "target_parameters": ["down_proj"]},
            {"model.layers.1.mlp.experts.down_proj"},
        ),
        ({"layers_to_transform": [0]}, in_layers("model.layers", MIXTRAL | EXPERTS, [0])),
        ({"modules_to_save": ["lm_head"]}, in_layers("model.layers", MIXTRAL) | PARAMETERS),
    ],
)
def test_which_parameters(options: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    model = random_adapter(**options, init_weights=False)
    assert adapted_names(model) == expected
    assert {
        name for name, layer in dowser_layers(model.get_base_model()).items() if isinstance(layer, FusedExperts)
    } == (expected & PARAMETERS)
    with torch.no_grad():
        y = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.tiny_mixtral(), tmp_path)
    assert adapted_names(loaded) == expected
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, y)


def test_rho_of_a_parameter() -> None:
    model = random_adapter(rho=0.1, rho_pattern={"down_proj": 0.5, r".*layers\.1\.mlp\.experts\.gate_up_proj": 0.2})
    found = {
        name: len(layer.dowser_values["default"]) for name, layer in expert_layers(model.get_base_model()).items()
    }
    gate_up, down = "model.layers.{}.mlp.experts.gate_up_proj", "model.layers.{}.mlp.experts.down_proj"
    assert found == {
        gate_up.format(0): 4 * num_trainable(48 * 16, 0.1),
        gate_up.format(1): 4 * num_trainable(48 * 16, 0.2),
        down.format(0): 4 * num_trainable(24 * 16, 0.5),
        down.format(1): 4 * num_trainable(24 * 16, 0.5),
    }


def test_a_reused_config_resolves_its_defaults_anew() -> None:
    config = DowserConfig(importance="random")
    get_peft_model(models.tiny_mixtral(num_hidden_layers=1), config)
    assert config.target_parameters == [f"model.layers.0.{name}" for name in sorted(EXPERTS, reverse=True)]
    assert (
        adapted_names(get_peft_model(models.tiny_mixtral(), config)) == in_layers("model.layers", MIXTRAL) | PARAMETERS
    )
    get_peft_model(models.tiny_llama(), config)
    assert config.target_parameters is None
    chosen = DowserConfig(importance="random", target_parameters=["down_proj"])
    for _ in range(2):
        assert adapted_names(get_peft_model(models.tiny_mixtral(), chosen)) & PARAMETERS == in_layers(
            "model.layers", {"mlp.experts.down_proj"}
        )


def test_columns_leave_experts_frozen_with_a_warning_and_refuse_target_parameters() -> None:
    with pytest.warns(
        UserWarning, match=r"experts of MixtralForCausalLM .* frozen: granularity='column' does not.*target_par"
    ):
        model = random_adapter(granularity="column")
    assert adapted_names(model) == in_layers("model.layers", MIXTRAL)
    with pytest.raises(ValueError, match=r"granularity='column' does not support target_parameters"):
        DowserConfig(granularity="column", target_parameters=["down_proj"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_parameters": ["experts.up_proj"]}, ValueError, "'experts.up_proj' matches no parameter; there are"),
        (
            {"target_parameters": ["q_proj.weight"]},
            TypeError,
            r"'model\.layers\.0\.self_attn\.q_proj\.weight' is not supp",
        ),
        ({"target_parameters": ["gate.weight"]}, TypeError, r"'model\.layers\.0\.mlp\.gate\.weight' is not supported"),
    ],
)
def test_parameters_that_cannot_be_meant(options: dict[str, Any], error: type[Exception], message: str) -> None:
    config = DowserConfig(importance="random", **options)
    with pytest.raises(error, match=message):
        get_peft_model(models.tiny_mixtral(), config)
    assert config.target_parameters == options["target_parameters"]


def test_experts_named_as_modules() -> None:
    """As they were called before transformers 5."""
    config = DowserConfig(importance="random", target_modules=["w1", "w2", "w3"])
    with pytest.raises(
        NoMatchingPeftModuleError, match=r"Experts are parameters: name them in target_parameters, such as"
    ):
        get_peft_model(models.tiny_mixtral(), config)
    with pytest.warns(UserWarning, match="stay frozen: they are no linear layers; name them in target_parameters"):
        random_adapter(target_modules="all-linear")


def test_target_parameters_as_a_string() -> None:
    with pytest.raises(TypeError, match=r"must be a list of name endings, such as \['down_proj'\]"):
        DowserConfig(target_parameters="down_proj")


def test_parameters_that_cannot_be_adapted() -> None:
    options: dict[str, Any] = {"importance": "random", "target_parameters": ["down_proj"]}
    model = models.tiny_mixtral()
    experts = model.model.layers[1].mlp.experts
    experts._is_expert_parallel = True
    with pytest.raises(
        ValueError, match=r"'model\.layers\.1\.mlp\.experts\.down_proj' is not supported: its experts are sh"
    ):
        get_peft_model(model, DowserConfig(**options))
    experts._is_expert_parallel = False
    experts.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"it is stored as torch\.float8_e4m3fn"):
        get_peft_model(model, DowserConfig(**options))
    experts = models.tiny_mixtral().model.layers[0].mlp.experts
    model = models.tiny_mixtral()
    lying = experts.down_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
    model.model.layers[0].mlp.experts.down_proj = nn.Parameter(lying)
    with pytest.raises(ValueError, match=r"its experts do not lie one after another"):
        get_peft_model(model, DowserConfig(**options))
    with torch.device("meta"):
        model = models.tiny_mixtral()
    with pytest.raises(ValueError, match=r"down_proj' is on the meta device"):
        get_peft_model(model, DowserConfig(target_modules=[], target_parameters=["down_proj"]))
    model = models.tiny_mixtral()
    cpu_offload(model.model.layers[0].mlp, execution_device="cpu")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj' is offloaded"):
        get_peft_model(model, DowserConfig(**options))


def test_offloaded_experts_stay_frozen_by_default_with_a_warning() -> None:
    model = models.tiny_mixtral()
    cpu_offload(model.model.layers[0].mlp, execution_device="cpu")
    with pytest.warns(
        UserWarning, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj and others\) stay frozen.*offloaded"
    ):
        adapted = get_peft_model(model, DowserConfig(**QUICK))
    assert adapted_names(adapted) & PARAMETERS == in_layers("model.layers", EXPERTS, [1])


def test_an_adapter_of_another_method_is_refused_and_may_sit_beside() -> None:
    lora = LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], lora_dropout=0.0)
    model = get_peft_model(models.tiny_mixtral(), lora).get_base_model()
    with pytest.raises(TypeError, match="already carries an adapter .*ParamWrapper"):
        get_peft_model(model, DowserConfig(importance="random", target_parameters=["gate_up_proj"], target_modules=[]))

    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    mixed = get_peft_model(models.tiny_mixtral(), lora, adapter_name="lora", mixed=True)
    with torch.no_grad():
        before = mixed(IDS).logits
    for seed, name in enumerate(["one", "two"]):
        parameters = ["experts.down_proj"] if name == "one" else ["experts.gate_up_proj", "experts.down_proj"]
        options: dict[str, Any] = {"target_modules": [], "target_parameters": parameters, "seed": seed}
        mixed.add_adapter(name, DowserConfig(importance="random", init_weights=False, **options))
    mixed.set_adapter(["lora", "one", "two"])
    with torch.no_grad():
        y = mixed(IDS).logits
        assert not torch.allclose(y, before)
        torch.testing.assert_close(mixed.merge_and_unload()(IDS).logits, y)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.tiny_mixtral()
    before = [(name, p.requires_grad) for name, p in base.named_parameters()]
    calls = []

    def fail(self: FusedExperts, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(FusedExperts, "_move_new_adapter", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        get_peft_model(base, DowserConfig(importance="random"))
    assert [(name, p.requires_grad) for name, p in base.named_parameters()] == before
    assert not any(isinstance(module, Experts) for module in base.modules())


def test_what_is_saved(tmp_path: Path) -> None:
    model = random_adapter(target_modules=[], target_parameters=["down_proj"], save_dtype="bfloat16")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.{}.mlp.experts.down_proj.dowser_{}"
    assert saved.keys() == {prefix.format(layer, part) for layer in (0, 1) for part in ("values", "mask")}
    assert {value.dtype for value in saved.values()} == {torch.bfloat16, torch.uint8}
    assert DowserConfig.from_pretrained(tmp_path).target_parameters == ["down_proj"]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_into_a_model_with_an_adapter(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = random_adapter(init_weights=False)
    model.save_pretrained(tmp_path)
    other = random_adapter(target_modules=["q_proj"])
    other.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    other.set_adapter("loaded")
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_what_adapters_of_experts_cannot_do_yet(tmp_path: Path) -> None:
    model = random_adapter(target_parameters=["down_proj"])
    model.add_adapter("other", DowserConfig(importance="random", target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters of fused experts \('.*down_proj'\) cannot be combined yet"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")
    assert all(layer.merged for layer in layers_with(model, "default"))
    model.unmerge_adapter()
    assert set(model.peft_config) == {"default", "other"}
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    with pytest.raises(ValueError, match="fused experts has no form in SHiRA"):
        export_shira(tmp_path, tmp_path / "shira", models.tiny_mixtral())


def test_an_adapter_is_replaced_in_place(tmp_path: Path) -> None:
    model = random_adapter(init_weights=False)
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    other = random_adapter(seed=3, init_weights=False)
    other.load_adapter(tmp_path, "default")
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, expected)


def test_training_goes_on_after_loading(tmp_path: Path) -> None:
    model = random_adapter(rho=0.2)
    losses = train(model, steps=4)
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(models.tiny_mixtral(), tmp_path, is_trainable=True)
    assert train(resumed, steps=3)[-1] < losses[-1]


def test_an_adapter_without_its_file_refuses_to_train(tmp_path: Path) -> None:
    model = random_adapter(target_modules=[], target_parameters=["down_proj"])
    model.save_pretrained(tmp_path)
    config = DowserConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    waiting = get_peft_model(models.tiny_mixtral(), config)
    with pytest.raises(RuntimeError, match="cannot train: in some layer its mask has not been loaded"):
        waiting(input_ids=IDS, labels=IDS)


def test_damaged_files(tmp_path: Path) -> None:
    model = random_adapter(target_modules=[], target_parameters=["down_proj"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    mask = "base_model.model.model.layers.1.mlp.experts.down_proj.dowser_mask"
    damaged = saved[mask].clone()
    damaged[0] ^= 0xFF
    save_file(saved | {mask: damaged}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj': the file is damaged, its mask marks"):
        PeftModel.from_pretrained(models.tiny_mixtral(), tmp_path)
    save_file(saved, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="size mismatch"):
        PeftModel.from_pretrained(models.tiny_mixtral(num_local_experts=3), tmp_path)


def test_other_base_weights_raise_an_alarm(tmp_path: Path) -> None:
    model = models.tiny_mixtral()
    statistics = probe(model, **QUICK, progress=False)
    fingerprint = base_fingerprint(layers_named(model, default_targets(model) + default_parameters(model)))
    assert statistics.fingerprint == fingerprint
    other = models.tiny_mixtral()
    other.model.layers[1].mlp.experts.down_proj.data.neg_()
    with pytest.warns(UserWarning, match="taken on other base weights"):
        get_peft_model(other, DowserConfig(importance=statistics))
    get_peft_model(model, DowserConfig(importance=statistics)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained on other base weights"):
        PeftModel.from_pretrained(unadapted(other), tmp_path)


def unadapted(model: Any) -> Any:
    plain = models.tiny_mixtral()
    plain.model.layers[1].mlp.experts.down_proj.data.neg_()
    return plain


def test_statistics_without_experts_serve_the_other_modules() -> None:
    model = models.tiny_mixtral()
    statistics = probe(model, **QUICK, progress=False, target_modules=default_targets(model))
    with pytest.raises(
        ValueError, match=r"do not cover 16 of 24 target modules, first 'model\.layers\.0\.mlp\.experts\.gate"
    ):
        get_peft_model(model, DowserConfig(importance=statistics))
    adapted = get_peft_model(model, DowserConfig(importance=statistics, target_parameters=[]))
    assert adapted_names(adapted) == in_layers("model.layers", MIXTRAL)


def test_one_probe_serves_several_adapters(tmp_path: Path) -> None:
    statistics = probe(models.tiny_mixtral(), **QUICK, progress=False)
    statistics.save(tmp_path / "statistics.safetensors")
    live = get_peft_model(models.tiny_mixtral(), DowserConfig(**QUICK))
    loaded = get_peft_model(models.tiny_mixtral(), DowserConfig(importance=str(tmp_path / "statistics.safetensors")))
    for one, other in zip(dowser_layers(live).values(), dowser_layers(loaded).values(), strict=True):
        assert torch.equal(one.dowser_mask["default"], other.dowser_mask["default"])
    assert isinstance(ProbeStatistics.load(tmp_path / "statistics.safetensors"), ProbeStatistics)


def test_a_second_adapter_is_probed_on_the_base_alone() -> None:
    model = get_peft_model(models.tiny_mixtral(), DowserConfig(init_weights=False, **QUICK))
    model.add_adapter("again", DowserConfig(**QUICK))
    for layer in dowser_layers(model).values():
        assert torch.equal(layer.dowser_mask["default"], layer.dowser_mask["again"])


def test_experts_in_16_bit_beside_4_bit_attention() -> None:
    """bitsandbytes quantises linear layers, and leaves parameters of three dimensions as they are."""
    bnb = pytest.importorskip("bitsandbytes")
    model = models.tiny_mixtral().bfloat16()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            plain = getattr(layer.self_attn, name)
            quantised = bnb.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=False, compute_dtype=torch.bfloat16
            )
            quantised.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4")
            setattr(layer.self_attn, name, quantised.to("cpu"))
    adapted = get_peft_model(model, DowserConfig(rho=0.2, **QUICK))
    assert adapted_names(adapted) == in_layers("model.layers", MIXTRAL) | PARAMETERS
    losses = train(adapted, steps=4)
    assert losses[-1] < losses[0]
