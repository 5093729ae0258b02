"""What leaves this package: merged models and SHiRA adapters, in a process that cannot import it; and the way back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dowser_peft import DowserConfig
from dowser_peft.exchange import export_shira, import_shira, tells_its_base
from tests.models import tiny_gpt2, tiny_llama, tiny_llava
from tests.test_model import IDS, dowser_layers
from tests.test_quantised import SIZES
from tests.test_quantised import load as load_quantised

CASES: dict[str, tuple[Callable[..., Any], torch.dtype, dict[str, Any]]] = {
    "float32": (tiny_llama, torch.float32, {}),
    "bfloat16": (tiny_llama, torch.bfloat16, {}),
    "float16": (tiny_llama, torch.float16, {}),
    "bfloat16 file": (tiny_llama, torch.bfloat16, {"save_dtype": "bfloat16"}),
    "columns": (tiny_llama, torch.bfloat16, {"granularity": "column"}),
    "uneven": (tiny_llama, torch.float32, {"rho_pattern": {"v_proj": 0.4}}),
    "whole head": (tiny_llama, torch.float32, {"modules_to_save": ["lm_head"]}),
    "llava": (tiny_llava, torch.float32, {}),
}

# Runs where neither this package nor its adapters exist: PEFT and transformers alone.
STRANGER = """
import json, sys, torch, transformers
sys.modules["dowser_peft"] = None  # importing it fails
from peft import PeftModel
from pathlib import Path
torch.set_num_threads(1)
root, result = Path(sys.argv[1]), {}
ids = torch.load(root / "ids.pt")
for case in sorted(root.glob("*/")):
    auto = transformers.AutoModelForImageTextToText if case.name == "llava" else transformers.AutoModelForCausalLM
    merged = auto.from_pretrained(case / "merged", dtype="auto")
    base = auto.from_pretrained(case / "base", dtype="auto")
    shira = PeftModel.from_pretrained(base, str(case / "shira"))
    assert {p.dtype for n, p in shira.named_parameters() if "shira_weight" in n} == {torch.float32}
    with torch.no_grad():
        found = {"merged": merged.eval()(ids).logits, "shira": shira.eval()(ids).logits}
        found["shira merged"] = shira.merge_and_unload()(ids).logits
    expected = torch.load(case / "expected.pt")
    result[case.name] = {name: torch.equal(logits, expected) for name, logits in found.items()}
try:
    import dowser_peft
    result["imported"] = True
except ImportError:
    result["imported"] = False
print(json.dumps(result))
"""


def load(folder: Path) -> Any:
    """As a user does: buffers stay float32 in a bfloat16 model, unlike after ``.to(torch.bfloat16)``."""
    auto = AutoModelForImageTextToText if "llava" in str(folder) else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype="auto").eval()


def adapted(base: Any, options: dict[str, Any]) -> Any:
    """A model with an adapter whose values are as if it had been trained."""
    config = DowserConfig(importance="magnitude", task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case folders ``base``, ``adapter``, ``shira`` and ``merged``, and the answer that is expected."""
    root = tmp_path_factory.mktemp("exchange")
    torch.save(IDS, root / "ids.pt")
    for case, (build, dtype, options) in CASES.items():
        build().to(dtype).save_pretrained(root / case / "base")
        model = adapted(load(root / case / "base"), options)
        model.save_pretrained(root / case / "adapter")
        with torch.device("meta"):
            shapes = build()
        export_shira(root / case / "adapter", root / case / "shira", shapes)
        if case == "bfloat16 file":
            model = PeftModel.from_pretrained(load(root / case / "base"), root / case / "adapter")
        merged = model.merge_and_unload()
        with torch.no_grad():
            torch.save(merged(IDS).logits, root / case / "expected.pt")
        merged.save_pretrained(root / case / "merged", max_shard_size="5KB")
    return root


@pytest.fixture(scope="module")
def strangers_view(root: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", STRANGER, str(root)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_this_package_computes_the_same_bits(case: str, root: Path, strangers_view: Any) -> None:
    assert strangers_view["imported"] is False
    assert strangers_view[case] == {"merged": True, "shira": True, "shira merged": True}
    assert len(list((root / case / "merged").glob("*.safetensors"))) > 1  # it was saved in shards


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, root: Path, tmp_path: Path) -> None:
    build, _, options = CASES[case]
    with torch.device("meta"):
        shapes = build()
    assert tells_its_base(root / case / "shira")
    trained = import_shira(root / case / "shira", tmp_path, shapes)
    original = load_file(root / case / "adapter" / "adapter_model.safetensors")
    found = load_file(tmp_path / "adapter_model.safetensors")
    old, new = (PeftConfig.from_pretrained(folder) for folder in (root / case / "adapter", tmp_path))
    for field in ("base_fingerprint", "importance", "save_dtype", "modules_to_save", "task_type"):
        assert getattr(new, field) == getattr(old, field), field
    if options.get("granularity") != "column":
        assert found.keys() == original.keys()
        for key, tensor in original.items():
            assert tensor.dtype == found[key].dtype and torch.equal(tensor, found[key])
    assert trained == sum(value.numel() for key, value in found.items() if key.endswith("values"))
    loaded = PeftModel.from_pretrained(load(root / case / "base"), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, torch.load(root / case / "expected.pt"))


def test_a_4bit_base(tmp_path: Path) -> None:
    """Shapes come from the unquantised model; both methods add to the same dequantised weight."""
    tiny_llama(**SIZES).save_pretrained(tmp_path / "base")
    model = adapted(load_quantised(tmp_path / "base", "nf4"), {})
    model.save_pretrained(tmp_path / "adapter")
    with torch.device("meta"):
        shapes = tiny_llama(**SIZES)
    export_shira(tmp_path / "adapter", tmp_path / "shira", shapes)
    shira = PeftModel.from_pretrained(load_quantised(tmp_path / "base", "nf4"), tmp_path / "shira").eval()
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(shira(IDS).logits, expected)
        with model.disable_adapter():
            assert not torch.equal(model(IDS).logits, expected)


def test_an_adapter_that_shira_trained(tmp_path: Path) -> None:
    """Positions in any order; the base tells the fingerprint, so loading on another base warns."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if hasattr(module, "shira_weight"):
            values = module.shira_weight["default"]
            values.data.copy_(torch.randn(values.shape, generator=generator))
            order = torch.randperm(values.numel(), generator=generator)
            module.shira_indices["default"] = module.shira_indices["default"][:, order]
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path / "shira")
    with torch.device("meta"):
        shapes = tiny_llama()
    with pytest.raises(ValueError, match="does not say which base weights"):
        import_shira(tmp_path / "shira", tmp_path / "dowser", shapes)
    import_shira(tmp_path / "shira", tmp_path / "dowser", tiny_llama())
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path / "dowser")(IDS).logits, expected)
    other = tiny_llama()
    for parameter in other.parameters():
        parameter.data.neg_()
    with pytest.warns(UserWarning, match="trained on other base weights"):
        PeftModel.from_pretrained(other, tmp_path / "dowser")


def test_every_module_gets_as_many_values_as_shira_wants(root: Path) -> None:
    file = load_file(root / "uneven" / "shira" / "adapter_model.safetensors")
    rank = PeftConfig.from_pretrained(root / "uneven" / "shira").r
    for name, layer in dowser_layers(adapted(load(root / "uneven" / "base"), CASES["uneven"][2])).items():
        values, indices = file[f"{name}.shira_weight"], file[f"{name}.shira_indices"]
        assert values.shape == (rank * (layer.in_features + layer.out_features),) and indices.dtype == torch.int32
        k = layer.dowser_values["default"].numel()
        assert torch.equal(values[:k], layer.dowser_values["default"]) and not values[k:].any()


def test_what_shira_cannot_hold(tmp_path: Path) -> None:
    wide = {"rho_pattern": {"down_proj": 0.9}, "target_modules": ["down_proj", "v_proj"]}
    cases: list[tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = [
        (tiny_gpt2, {"fan_in_fan_out": True}, TypeError, "'transformer.h.0.*' is a Conv1D: SHiRA adapts"),
        (tiny_llama, {"bias": "all"}, ValueError, "bias='all' has no form in SHiRA"),
        (tiny_llama, wide, ValueError, "SHiRA has one rank for all modules. '.*down_proj' needs 9, .* in '.*v_proj'"),
    ]
    for build, options, error, message in cases:
        get_peft_model(build(), DowserConfig(importance="magnitude", **options)).save_pretrained(tmp_path / "adapter")
        with pytest.raises(error, match=message):
            export_shira(tmp_path / "adapter", tmp_path / "shira", build())
        assert not (tmp_path / "shira").exists()


@pytest.mark.parametrize("which", ["shira", "adapter"])
def test_damaged_files_and_other_bases(which: str, root: Path, tmp_path: Path) -> None:
    convert = import_shira if which == "shira" else export_shira
    source = root / "float32" / which
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    weights = tmp_path / "in" / "adapter_model.safetensors"
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        convert(tmp_path / "in", tmp_path / "out", tiny_llama())
    weights.write_bytes((source / weights.name).read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated or corrupted"):
        convert(tmp_path / "in", tmp_path / "out", tiny_llama())
    tensors = load_file(source / weights.name)
    key = next(key for key in tensors if key.endswith(("indices", "mask")))
    save_file({**tensors, key: tensors[key][:1].clone()}, weights)
    with pytest.raises(ValueError, match="'.*': the file is damaged"):
        convert(tmp_path / "in", tmp_path / "out", tiny_llama())
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    with pytest.raises(ValueError, match="'.*': the file is damaged"):
        convert(tmp_path / "in", tmp_path / "out", tiny_llama())
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="other? base model"):
        convert(tmp_path / "in", tmp_path / "out", tiny_llama(intermediate_size=8))
    with pytest.raises(ValueError, match="not of this base model, which has no layer"):
        convert(tmp_path / "in", tmp_path / "out", tiny_llama(num_hidden_layers=1))
    other = root / "float32" / ("adapter" if which == "shira" else "shira")
    with pytest.raises(ValueError, match="is an adapter of the method"):
        convert(other, tmp_path / "out", tiny_llama())
    assert not (tmp_path / "out").exists()


def test_a_vision_tower_with_like_names_stays_as_it_is(root: Path) -> None:
    model = PeftModel.from_pretrained(load(root / "llava" / "base"), root / "llava" / "shira").get_base_model()
    names = {name for name, module in model.named_modules() if hasattr(module, "shira_weight")}
    assert names == set(dowser_layers(adapted(tiny_llava(), {}).get_base_model()))
