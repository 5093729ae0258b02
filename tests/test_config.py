"""DowserConfig: validation, and that every field matters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType

from dowser_peft import DowserConfig


def test_works_without_arguments() -> None:
    config = DowserConfig()
    assert config.rho == 0.1
    assert config.peft_type is PeftType.DOWSER
    assert config.importance == "dowser"
    assert (config.num_prompts, config.num_probes, config.prompt_length) == (64, 8, 64)
    assert (config.temperature, config.top_p, config.repetition_penalty) == (0.9, 0.9, 1.05)


@pytest.mark.parametrize("rho", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_rho_out_of_range(rho: float) -> None:
    with pytest.raises(ValueError, match=r"rho must be in \(0, 1\], got"):
        DowserConfig(rho=rho)


def test_rho_as_a_percentage_says_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"rho is a fraction: for 10 % write 0\.1"):
        DowserConfig(rho=10)


@pytest.mark.parametrize("rho", ["0.1", None, True])
def test_rho_of_another_type(rho: object) -> None:
    with pytest.raises(TypeError, match="rho must be a number"):
        DowserConfig(rho=rho)


def test_rho_pattern_is_validated_too() -> None:
    with pytest.raises(ValueError, match=r"rho_pattern\['q_proj'\] must be in \(0, 1\], got 2"):
        DowserConfig(rho_pattern={"q_proj": 2.0})


def test_rho_of() -> None:
    config = DowserConfig(rho=0.1, rho_pattern={"q_proj": 0.2, r".*\.3\.mlp\.\w+": 0.5})
    assert config.rho_of("model.layers.0.self_attn.q_proj") == 0.2
    assert config.rho_of("model.layers.3.mlp.up_proj") == 0.5
    assert config.rho_of("model.layers.2.mlp.up_proj") == 0.1


def test_rho_of_a_full_name_goes_before_a_regex() -> None:
    config = DowserConfig(rho_pattern={"layers.0.up": 0.2, "vision.layers.0.up": 0.5, "a(b": 0.7})
    assert config.rho_of("vision.layers.0.up") == 0.5
    assert config.rho_of("other.layers.0.up") == 0.2
    assert config.rho_of("a(b") == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prompts": 0}, "num_prompts must be a positive integer, got 0"),
        ({"num_probes": 1.5}, "num_probes must be a positive integer, got 1.5"),
        ({"prompt_length": -3}, "prompt_length must be a positive integer, got -3"),
        ({"probe_tolerance": 1.5}, "probe_tolerance is a share of the trained weights, in .0, 1., or None; got 1.5"),
        ({"probe_tolerance": 0.1, "estimator": "mean_abs"}, "probe_tolerance needs estimator='rms'"),
        ({"probe_batch_size": 0}, "probe_batch_size must be a positive integer, got 0"),
        ({"num_last_layers": True}, "num_last_layers must be a positive integer, got True"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be positive, got 0"),
        ({"bias": "lora_only"}, "bias must be one of .* got 'lora_only'"),
        ({"estimator": "median"}, "estimator must be one of .* got 'median'"),
        ({"save_dtype": "int8"}, "save_dtype must be one of .* got 'int8'"),
        ({"importance": "wnada"}, "importance='wnada' is neither one of .* nor a file of probe statistics"),
        ({"num_last_layers": 2, "layers_to_transform": [0]}, "either num_last_layers or layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern says where layers_to_transform counts"),
        ({"layers_to_transform": [0], "target_modules": "q.*"}, "cannot be used with target_modules as a string"),
    ],
)
def test_bad_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DowserConfig(**options)


def test_importance_of_another_type() -> None:
    with pytest.raises(TypeError, match="ProbeStatistics or the path of their file, got list"):
        DowserConfig(importance=["dowser"])


def test_images_are_there_or_not() -> None:
    with pytest.raises(TypeError, match="probe_images must be True or False, got 'noise'"):
        DowserConfig(probe_images="noise")  # type: ignore[arg-type]


def test_every_field_is_documented_once_and_shown_in_the_docstring() -> None:
    own = [f for f in dataclasses.fields(DowserConfig) if f.name in DowserConfig.__annotations__]
    assert len(own) >= 20
    for field in own:
        assert field.metadata["help"] in DowserConfig.__doc__


def test_saves_and_loads(tmp_path: Path) -> None:
    config = DowserConfig(rho=0.3, rho_pattern={"a": 0.5}, target_modules=["q", "k"], seed=3)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DowserConfig)
    assert loaded == config
    assert not loaded.is_saved_adapter  # a recipe, not an adapter: it will probe


def test_what_matters_only_at_creation_is_not_saved(tmp_path: Path) -> None:
    statistics = tmp_path / "statistics.safetensors"
    statistics.touch()
    config = DowserConfig(importance=statistics, probe_batch_size=4)
    config.save_pretrained(tmp_path / "saved")
    statistics.unlink()
    loaded = DowserConfig.from_pretrained(tmp_path / "saved")
    assert loaded.importance == "dowser" and loaded.probe_batch_size is None
    assert config.importance == statistics and config.probe_batch_size == 4


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DowserConfig(rho=0.2).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_text()

    def disk_full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", disk_full)
    with pytest.raises(OSError, match="No space left"):
        DowserConfig(rho=0.3).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    assert (tmp_path / "adapter_config.json").read_text() == before


def test_unknown_fields_of_a_newer_version_are_ignored_with_a_warning(tmp_path: Path) -> None:
    DowserConfig(rho=0.2).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert DowserConfig.from_pretrained(tmp_path).rho == 0.2
