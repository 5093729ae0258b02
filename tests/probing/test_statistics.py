"""The file of a probe: round trip, damage, size, and what it says about another model."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import dowser_peft.storage
from dowser_peft import ProbeStatistics, probe
from dowser_peft.base_layer import linear_shape
from dowser_peft.targets import default_targets
from tests import models


@pytest.fixture(scope="module")
def statistics() -> ProbeStatistics:
    return probe(models.tiny_llama(), num_prompts=3, num_probes=2, prompt_length=5, seed=7, progress=False)


@pytest.fixture
def path(statistics: ProbeStatistics, tmp_path: Path) -> Path:
    file = tmp_path / "statistics.safetensors"
    statistics.save(file)
    return file


def test_round_trip(statistics: ProbeStatistics, path: Path) -> None:
    loaded = ProbeStatistics.load(path)
    for field in dataclasses.fields(ProbeStatistics):
        one, other = getattr(loaded, field.name), getattr(statistics, field.name)
        if field.name in ("activations", "sensitivities"):
            assert list(one) == list(other)  # the order too: the fingerprint follows it
            assert all(one[name].dtype == torch.bfloat16 and torch.equal(one[name], other[name]) for name in other)
        else:
            assert one == other, field.name
    assert loaded.module_names == statistics.module_names
    assert str(path) == str(path) and ProbeStatistics.load(str(path)).seed == 7


def test_what_it_remembers(statistics: ProbeStatistics) -> None:
    assert (statistics.num_prompts, statistics.num_probes, statistics.prompt_length) == (3, 2, 5)
    assert (statistics.estimator, statistics.source, statistics.seed) == ("rms", "synthetic", 7)
    assert set(statistics.versions) == {"dowser-peft", "torch", "transformers", "peft"}
    assert len(statistics.fingerprint) == 16
    assert statistics.shape("model.layers.0.mlp.down_proj") == (models.HIDDEN, 24)


def test_a_copy_is_the_same_object(statistics: ProbeStatistics) -> None:
    assert copy.deepcopy(statistics) is statistics  # configs are deep-copied; hundreds of megabytes are not
    with pytest.raises(dataclasses.FrozenInstanceError):
        statistics.seed = 1  # type: ignore[misc]


def test_modules_with_one_input_are_stored_once(statistics: ProbeStatistics, path: Path) -> None:
    numbers = sum(value.numel() for value in (statistics.activations | statistics.sensitivities).values())
    outputs = sum(value.numel() for value in statistics.sensitivities.values())
    inputs = sum(value.numel() for value in statistics.activations.values())
    assert inputs == models.LAYERS * 3 * (3 * models.HIDDEN + 24)
    assert outputs + inputs <= numbers + inputs
    assert 2 * (outputs + inputs) < path.stat().st_size < 2 * (outputs + inputs) + 10_000


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of probe statistics at .*nowhere"):
        ProbeStatistics.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        ProbeStatistics.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 200, -1, -500])
def test_truncated_file(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"statistics\.safetensors.*truncated or corrupted"):
        ProbeStatistics.load(path)


@pytest.mark.parametrize("content", [b"not safetensors at all", b"\xff" * 400, b"\x00" * 400])
def test_garbage(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or corrupted"):
        ProbeStatistics.load(path)


def test_another_kind_of_safetensors_file(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is not a file of probe statistics: its format is None"):
        ProbeStatistics.load(path)
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its format is 'pt', expected 'dowser-peft"):
        ProbeStatistics.load(path)


def rewritten(path: Path, change: Any) -> None:
    """Write the file again after ``change(tensors, header)``."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["probe"])
    change(tensors, header)
    save_file(tensors, path, metadata=metadata | {"probe": json.dumps(header)})


MODULE = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: tensors.pop(f"sensitivity.{MODULE}"),
        lambda tensors, header: tensors.pop(f"activation.{MODULE}"),
        lambda tensors, header: header.pop("seed"),
        lambda tensors, header: header.pop("input_groups"),
        lambda tensors, header: header.update(unheard_of=1),
        lambda tensors, header: header["input_groups"].update({MODULE: "elsewhere"}),
        lambda tensors, header: tensors.update({f"sensitivity.{MODULE}": torch.zeros(2, 16, dtype=torch.bfloat16)}),
        lambda tensors, header: tensors.update({f"sensitivity.{MODULE}": torch.zeros(3, dtype=torch.bfloat16)}),
        lambda tensors, header: header.update(input_groups={}),
    ],
)
def test_a_file_that_does_not_fit_together(path: Path, change: Any) -> None:
    rewritten(path, change)
    with pytest.raises(ValueError, match=r"statistics\.safetensors' are damaged"):
        ProbeStatistics.load(path)


def test_a_file_written_before_probes_could_end_by_themselves(statistics: ProbeStatistics, path: Path) -> None:
    rewritten(path, lambda tensors, header: [header.pop(key) for key in ("mask_error", "mask_error_rho", "images")])
    loaded = ProbeStatistics.load(path)
    assert loaded.mask_error is None and not loaded.images and loaded.fingerprint == statistics.fingerprint


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_file(
    statistics: ProbeStatistics, path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fails(tensors: Any, file: Any, metadata: Any) -> None:
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(dowser_peft.storage, "save_file", fails)
    with pytest.raises(type(error)):
        statistics.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    """For real: the process may write no more than a kilobyte."""
    before = path.read_bytes()
    script = f"""
        import resource, signal
        from dowser_peft import ProbeStatistics
        statistics = ProbeStatistics.load({str(path)!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
        try:
            statistics.save({str(path)!r})
        except Exception as error:
            print("failed:", type(error).__name__)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert "failed:" in done.stdout, done.stderr
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_saving_makes_folders_and_replaces(statistics: ProbeStatistics, tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file.safetensors"
    statistics.save(file)
    statistics.save(str(file))
    assert ProbeStatistics.load(file).fingerprint == statistics.fingerprint


def test_a_file_of_a_7b_llama_stays_under_300_mb() -> None:
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig())  # the defaults are those of Llama 7B
    assert sum(parameter.numel() for parameter in model.parameters()) > 6.7e9
    names = default_targets(model)
    shapes = {name: linear_shape(model.get_submodule(name)) for name in names}
    shared = ("k_proj", "v_proj", "up_proj")  # read the input of q_proj and gate_proj
    inputs = sum(shape[1] for name, shape in shapes.items() if not name.endswith(shared))
    outputs = sum(shape[0] for shape in shapes.values())
    assert len(names) == 7 * 32
    assert 64 * 2 * (inputs + outputs) < 300e6


def test_another_architecture_is_told_apart(statistics: ProbeStatistics) -> None:
    def shapes(model: Any) -> dict[str, tuple[int, int]]:
        return {name: linear_shape(model.get_submodule(name)) for name in default_targets(model)}

    statistics.check_modules(shapes(models.tiny_llama()))
    subset = dict(list(shapes(models.tiny_llama()).items())[3:5])
    statistics.check_modules(subset)
    wrong = r"another architecture: 'model\.layers\.0\.mlp\.gate_proj' is \[32, 16\].*but \[24, 16\].*6 of 14 modules"
    with pytest.raises(ValueError, match=wrong):
        statistics.check_modules(shapes(models.tiny_llama(intermediate_size=32)))
    with pytest.raises(ValueError, match=r"do not cover 7 of 21 target modules, first 'model\.layers\.2\.self_attn"):
        statistics.check_modules(shapes(models.tiny_llama(num_hidden_layers=3)))
    with pytest.raises(ValueError, match=r"do not cover 8 of 8.*'transformer\.h\.0\.attn\.c_attn'.*'model\.layers"):
        statistics.check_modules(shapes(models.tiny_gpt2()))
