"""``dowser-peft probe``: the file it writes is what ``dowser_peft.probe`` returns."""

from __future__ import annotations

import pytest
import torch

from dowser_peft import ProbeStatistics, probe
from dowser_peft.cli.models import Source, load_model

SMALL = ("--num-prompts", 4, "--num-probes", 2, "--prompt-length", 8)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_statistics_are_those_of_the_python_function(dowser_json, tmp_path, request, name):
    folder = request.getfixturevalue(name)
    output = tmp_path / "new folder" / "stats.safetensors"
    result = dowser_json("probe", folder, "-o", output, *SMALL, "--seed", 3, "--temperature", 0.7)
    written = ProbeStatistics.load(output)
    expected = probe(
        load_model(Source(str(folder))),
        num_prompts=4,
        num_probes=2,
        prompt_length=8,
        seed=3,
        temperature=0.7,
        progress=False,
    )
    assert set(written.module_names) == set(expected.module_names)
    for module in expected.module_names:
        assert torch.equal(written.sensitivity(module), expected.sensitivity(module))
        assert torch.equal(written.activation(module), expected.activation(module))
    assert written.fingerprint == expected.fingerprint
    assert result | {"seconds": 0} == {
        "model": str(folder),
        "output": str(output),
        "modules": 14,
        "num_prompts": 4,
        "num_probes": 2,
        "prompt_length": 8,
        "images": False,
        "estimator": "rms",
        "seed": 3,
        "mask_error": None,
        "mask_error_rho": None,
        "fingerprint": expected.fingerprint,
        "file_bytes": output.stat().st_size,
        "seconds": 0,
    }


def test_summary_for_people(dowser, tmp_path, llama):
    output = tmp_path / "s.safetensors"
    result = dowser("probe", llama, "-o", output, *SMALL)
    assert result.exit_code == 0, result.output
    for part in ("modules", "14", "N = 4 of 8 tokens, R = 2", str(output)):
        assert part in result.stdout


def test_a_probe_that_ends_by_itself(dowser, dowser_json, tmp_path, llama):
    output = tmp_path / "s.safetensors"
    report = dowser_json("probe", llama, "-o", output, *SMALL, "--num-prompts", 20, "--tolerance", 0.7, "--rho", 0.2)
    written = ProbeStatistics.load(output)
    assert (report["num_prompts"], report["num_probes"]) == (written.num_prompts, written.num_probes) == (16, 1)
    assert report["mask_error"] == written.mask_error <= 0.7 and report["mask_error_rho"] == 0.2
    assert dowser_json("inspect", output)["mask_error"] == written.mask_error
    for command in (("inspect", output), ("probe", llama, "-o", output, *SMALL, "--tolerance", 0.7, "--rho", 0.2)):
        shown = dowser(*command).stdout
        assert "mask error" in shown and "expected, at rho = 0.2" in shown
    assert "mask error" not in dowser("probe", llama, "-o", output, *SMALL).stdout


def test_dtype_is_that_of_the_loaded_weights(dowser_json, tmp_path, llama):
    assert load_model(Source(str(llama))).dtype == torch.bfloat16
    assert load_model(Source(str(llama)), "float32").dtype == torch.float32
    dowser_json("probe", llama, "-o", tmp_path / "a", *SMALL)
    dowser_json("probe", llama, "-o", tmp_path / "b", *SMALL, "--dtype", "float32")
    a, b = ProbeStatistics.load(tmp_path / "a"), ProbeStatistics.load(tmp_path / "b")
    assert a.fingerprint == b.fingerprint
    name = a.module_names[0]
    assert not torch.equal(a.sensitivity(name), b.sensitivity(name))


def test_older_statistics_are_replaced_but_no_other_file(dowser, dowser_json, tmp_path, llama):
    output = tmp_path / "s.safetensors"
    dowser_json("probe", llama, "-o", output, *SMALL)
    dowser_json("probe", llama, "-o", output, *SMALL, "--seed", 1)
    assert ProbeStatistics.load(output).seed == 1
    weights = llama / "model.safetensors"
    before = weights.read_bytes()
    result = dowser("probe", llama, "-o", weights, *SMALL)
    assert result.exit_code == 1 and "not a file of probe statistics" in result.stderr
    assert weights.read_bytes() == before


def test_a_probe_with_images(dowser, dowser_json, tmp_path, llava):
    output = tmp_path / "s.safetensors"
    assert dowser_json("probe", llava, "-o", output, *SMALL, "--images")["images"]
    assert ProbeStatistics.load(output).images and dowser_json("inspect", output)["images"]
    assert (
        "N = 4 of 8 tokens behind an image, R = 2" in dowser("probe", llava, "-o", output, *SMALL, "--images").stdout
    )
    assert "synthetic behind images" in dowser("inspect", output).stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--estimator", "median", "estimator must be"),
        ("--temperature", "0", "temperature must be positive"),
        ("--top-p", "1.5", "top_p must be"),
        ("--repetition-penalty", "-1", "repetition_penalty must be"),
        ("--dtype", "int8", "--dtype must be one of auto"),
        ("--tolerance", "5.0", "probe_tolerance is a share of the trained weights"),
    ],
)
def test_bad_values(dowser, tmp_path, llama, option, value, message):
    result = dowser("probe", llama, "-o", tmp_path / "s", option, value)
    assert result.exit_code == 1
    assert message in result.stderr and value in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_folder(dowser, tmp_path, llama):
    result = dowser("probe", llama, "-o", tmp_path)
    assert result.exit_code == 1 and "is a folder" in result.stderr


def test_model_without_tokenizer(dowser, tmp_path, llama):
    import shutil

    folder = shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    result = dowser("probe", folder, "-o", tmp_path / "s", *SMALL)
    assert result.exit_code == 0, result.output
    assert "without a tokenizer" in result.stderr


def test_four_bit(dowser, dowser_json, tmp_path, llama, monkeypatch):
    pytest.importorskip("bitsandbytes")
    assert dowser_json("probe", llama, "-o", tmp_path / "s", *SMALL, "--load-in-4bit")["modules"] == 14
    from dowser_peft.cli import models

    monkeypatch.setattr(models, "find_spec", lambda name: None)
    result = dowser("probe", llama, "-o", tmp_path / "s", *SMALL, "--load-in-4bit")
    assert result.exit_code == 1 and 'pip install "dowser-peft[quant]"' in result.stderr
