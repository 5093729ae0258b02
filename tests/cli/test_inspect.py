"""``dowser-peft inspect``: what it reports, against values computed from the adapter itself."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from dowser_peft import DowserConfig, ProbeStatistics
from dowser_peft.cli.models import Source, load_model
from tests import models
from tests.cli.conftest import trained_adapter


@pytest.fixture(scope="module")
def statistics(llama, tmp_path_factory) -> Path:
    from dowser_peft import probe

    path = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    probe(load_model(Source(str(llama))), num_prompts=4, num_probes=2, prompt_length=8, progress=False).save(path)
    return path


def _fullest_tenth(counts: torch.Tensor) -> float:
    ordered = sorted(counts.tolist(), reverse=True)
    return sum(ordered[: max(1, round(0.1 * len(ordered)))]) / sum(ordered)


@pytest.mark.parametrize("name", ["llama", "llava"])
def test_adapter(dowser_json, request, name):
    base, folder = request.getfixturevalue(name), request.getfixturevalue(f"{name}_adapter")
    report = dowser_json("inspect", folder)
    adapted = PeftModel.from_pretrained(load_model(Source(str(base)), "float32"), str(folder))
    assert report["kind"] == "adapter" and report["base_model"] == str(base)
    assert report["file_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert len(report["modules"]) == 14
    trained, squares = 0, 0.0
    for module in report["modules"]:
        layer = adapted.get_base_model().get_submodule(module["name"])
        delta = layer.get_delta_weight("default").detach()
        mask = delta != 0
        assert module["shape"] == list(delta.shape)
        assert module["trained"] == int(mask.sum()) and module["total"] == mask.numel()
        assert module["rho"] == module["trained"] / module["total"]
        assert module["l2"] == pytest.approx(float(delta.norm()), rel=1e-6)
        assert module["max_abs"] == float(delta.abs().max())
        assert module["in_fullest_rows"] == pytest.approx(_fullest_tenth(mask.sum(1)))
        assert module["in_fullest_columns"] == pytest.approx(_fullest_tenth(mask.sum(0)))
        assert f".{module['layer']}." in module["name"] and module["name"].endswith(module["module"])
        trained += module["trained"]
        squares += module["l2"] ** 2
    assert report["trained"] == trained and report["rho"] == trained / report["total"]
    assert report["l2"] == pytest.approx(squares**0.5)


def test_rows_are_outputs_also_of_transposed_layers(dowser_json, tmp_path):
    base = tmp_path / "gpt2"
    models.tiny_gpt2().save_pretrained(base)
    folder = trained_adapter(base, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load_model(Source(str(base))), str(folder))
    for module in dowser_json("inspect", folder)["modules"]:
        stored = adapted.get_base_model().get_submodule(module["name"]).get_delta_weight("default") != 0
        assert module["shape"] == list(stored.T.shape)
        assert module["in_fullest_rows"] == pytest.approx(_fullest_tenth(stored.sum(0)))
        assert module["in_fullest_columns"] == pytest.approx(_fullest_tenth(stored.sum(1)))


@pytest.mark.parametrize("build", [models.tiny_mixtral, models.tiny_gpt_oss])
def test_fused_experts(dowser, dowser_json, tmp_path, build):
    """One row a parameter of an adapter, one row an expert of statistics."""
    base = tmp_path / "base"
    build().save_pretrained(base)
    folder = trained_adapter(base, tmp_path / "adapter", rho=0.2)
    model = load_model(Source(str(base)))
    adapted = PeftModel.from_pretrained(model, str(folder)).get_base_model()
    rows = [module for module in dowser_json("inspect", folder)["modules"] if "experts" in module["name"]]
    assert len(rows) == 4
    for row in rows:
        layer = adapted.get_submodule(row["name"])
        marked = layer.get_delta_weight("default") != 0
        if build is models.tiny_gpt_oss:
            marked = marked.transpose(1, 2)
        marked = marked.flatten(0, 1)  # [experts * out, in]
        assert row["shape"] == list(marked.shape) and row["trained"] == int(marked.sum())
        assert row["in_fullest_rows"] == pytest.approx(_fullest_tenth(marked.sum(1)))
        assert row["in_fullest_columns"] == pytest.approx(_fullest_tenth(marked.sum(0)))

    path = tmp_path / "stats.safetensors"
    dowser_json("probe", base, "-o", path, "--num-prompts", 4, "--num-probes", 2, "--prompt-length", 8)
    saved = ProbeStatistics.load(path)
    plain = load_model(Source(str(base)))
    rows = [m for m in dowser_json("inspect", path, "--model", base)["modules"] if "experts" in m["name"]]
    assert len(rows) == 16 and rows[0]["name"].endswith(".down_proj.0")
    for row in rows:
        parameter, _, index = row["name"].rpartition(".")
        weight = plain.get_parameter(parameter)[int(index)].detach().abs().float()
        score = saved.sensitivity(row["name"]).float().T @ saved.activation(row["name"]).float() / 4
        score = score * (weight.T if build is models.tiny_gpt_oss else weight)
        assert row["shape"] == list(score.shape)
        assert row["score"]["max"] == pytest.approx(float(score.max()), rel=1e-4)
    result = dowser("inspect", path, "--model", base, "--plot", tmp_path / "out.png")
    assert result.exit_code == 0 and (tmp_path / "out.png").is_file() and "other weights" not in result.output


def test_adapter_of_columns(dowser, dowser_json, llama, tmp_path):
    folder = trained_adapter(llama, tmp_path / "adapter", granularity="column", rho=0.2)
    adapted = PeftModel.from_pretrained(load_model(Source(str(llama)), "float32"), str(folder)).get_base_model()
    report = dowser_json("inspect", folder)
    assert report["granularity"] == "column" and report["rho"] == report["trained"] / report["total"]
    for module in report["modules"]:
        delta = adapted.get_submodule(module["name"]).get_delta_weight("default").detach()
        assert module["shape"] == list(delta.shape) and module["total"] == delta.numel()
        assert module["trained"] == int((delta != 0).sum())
        assert module["columns"] == int((delta != 0).any(0).sum())
        assert module["l2"] == pytest.approx(float(delta.norm()), rel=1e-6)
        assert module["in_fullest_rows"] is None and module["in_fullest_columns"] is None
    result = dowser("inspect", folder, "--plot", tmp_path / "out.png")
    assert "whole input columns" in result.stdout and "rows10" not in result.stdout
    assert max(map(len, result.stdout[result.stdout.index("Trained weights per module") :].splitlines())) <= 80
    assert (tmp_path / "out.png").is_file()

    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    without_base = dowser_json("inspect", folder, "--plot", tmp_path / "without.png")
    assert without_base["total"] is None and without_base["rho"] is None
    assert [m["columns"] for m in without_base["modules"]] == [m["columns"] for m in report["modules"]]
    assert (tmp_path / "without.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda columns: columns + 1000, "of 'model.layers.0.self_attn.q_proj' include"),
        (lambda columns: columns.flip(0), "are not in ascending order"),
        (lambda columns: columns[1:].clone(), "for values of shape"),
    ],
)
def test_damaged_columns(dowser, llama, tmp_path, change, message):
    folder = trained_adapter(llama, tmp_path / "adapter", granularity="column", rho=0.2)
    _edit(folder, lambda tensors: tensors.update({k: change(v) for k, v in tensors.items() if k.endswith("columns")}))
    result = dowser("inspect", folder)
    assert result.exit_code == 1 and message in result.stderr


def test_adapter_table_fits_80_columns(dowser, llama_adapter):
    result = dowser("inspect", llama_adapter)
    assert result.exit_code == 0
    table = result.stdout[result.stdout.index("Trained weights per module") :].splitlines()
    assert max(map(len, table)) <= 80
    assert sum("q_proj" in line for line in table) == 2
    assert "rows10" in table[1] and "cols10" in table[1]


def test_adapter_whose_base_is_not_at_hand(dowser, dowser_json, tmp_path, llama, llama_adapter):
    folder = Path(shutil.copytree(llama_adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result = dowser("inspect", folder)
    assert result.exit_code == 0
    assert "rows10" not in result.stdout and "'/gone'" in result.stderr
    assert dowser_json("inspect", folder)["modules"][0]["in_fullest_rows"] is None
    known = dowser_json("inspect", folder, "--model", llama)["modules"]
    assert known == dowser_json("inspect", llama_adapter)["modules"]
    result = dowser("inspect", folder, "--model", "/gone/too")
    assert result.exit_code == 1 and "/gone/too" in result.stderr


def test_weights_saved_in_full_are_counted(dowser_json, llama, tmp_path):
    folder = trained_adapter(llama, tmp_path / "adapter", modules_to_save=["lm_head"])
    assert dowser_json("inspect", folder)["other_weights"] == models.VOCABULARY * models.HIDDEN


def test_statistics(dowser_json, statistics, llama):
    report = dowser_json("inspect", statistics)
    expected = ProbeStatistics.load(statistics)
    assert report["kind"] == "statistics"
    for name in (
        "num_prompts",
        "num_probes",
        "prompt_length",
        "seed",
        "estimator",
        "source",
        "fingerprint",
        "versions",
    ):
        assert report[name] == getattr(expected, name), name
    assert {module["name"] for module in report["modules"]} == set(expected.module_names)
    for module in report["modules"]:
        for factor, values in (
            ("activation", expected.activation(module["name"])),
            ("sensitivity", expected.sensitivity(module["name"])),
        ):
            ordered = values.float().mean(0).sort().values
            for key, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("max", 1.0)):
                assert module[factor][key] == pytest.approx(float(ordered[round(q * (len(ordered) - 1))]), rel=1e-5)
        assert module["score"] is None


def test_scores_and_cut_are_those_of_the_adapter(dowser_json, statistics, llama):
    report = dowser_json("inspect", statistics, "--model", llama, "--rho", 0.2)
    loaded = ProbeStatistics.load(statistics)
    model = load_model(Source(str(llama)))
    weights = {m["name"]: model.get_submodule(m["name"]).weight.detach().float() for m in report["modules"]}
    adapted = get_peft_model(model, DowserConfig(importance=loaded, rho=0.2))
    for module in report["modules"]:
        name = module["name"]
        psi, a = loaded.sensitivity(name).double(), loaded.activation(name).double()
        score = weights[name].abs().double() * torch.einsum("no,ni->oi", psi, a) / psi.shape[0]
        ordered = score.view(-1).sort().values
        for key, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("max", 1.0)):
            assert module["score"][key] == pytest.approx(float(ordered[round(q * (len(ordered) - 1))]), rel=1e-5)
        layer = adapted.get_base_model().get_submodule(name)
        trained = score.view(-1)[layer.positions("default").long()]
        assert module["score"]["cut"] == pytest.approx(float(trained.max()), rel=1e-5)


def test_statistics_for_people(dowser, statistics, llama):
    result = dowser("inspect", statistics, "--model", llama)
    assert result.exit_code == 0
    assert "warning" not in result.stderr and "other weights" not in result.stderr
    assert "4, of 8 tokens" in result.stdout and "cut for rho = 0.1" in result.stdout
    assert max(map(len, result.stdout[result.stdout.index("Activation") :].splitlines())) <= 80


def test_statistics_of_other_weights_are_told_apart(dowser, statistics, tmp_path):
    torch.manual_seed(1)
    model = models.tiny_llama()
    for parameter in model.parameters():
        parameter.data.neg_()
    model.save_pretrained(tmp_path / "other")
    result = dowser("inspect", statistics, "--model", tmp_path / "other")
    assert result.exit_code == 0 and "other weights than the one that was probed" in result.stderr
    models.tiny_llama(intermediate_size=32).save_pretrained(tmp_path / "wider")
    result = dowser("inspect", statistics, "--model", tmp_path / "wider")
    assert result.exit_code == 1 and "another architecture" in result.stderr


@pytest.mark.parametrize("kind", ["adapter", "adapter without base", "statistics", "scores"])
def test_plot_is_a_picture_with_something_in_it(dowser_json, tmp_path, llama, llama_adapter, statistics, kind):
    picture = tmp_path / "out.png"
    path, options = (statistics, ("--model", llama) if kind == "scores" else ())
    if kind.startswith("adapter"):
        path = Path(shutil.copytree(llama_adapter, tmp_path / "adapter"))
        if kind == "adapter without base":
            config = json.loads((path / "adapter_config.json").read_text())
            (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert dowser_json("inspect", path, *options, "--plot", picture)["plot"] == str(picture)
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 800 and image.height > 400
        assert len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_plot_of_an_untrained_adapter(dowser_json, tmp_path, llama):
    adapted = get_peft_model(load_model(Source(str(llama))), DowserConfig(importance="random"))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    report = dowser_json("inspect", tmp_path / "adapter", "--plot", tmp_path / "out.png")
    assert report["l2"] == 0 and (tmp_path / "out.png").is_file()


def test_plot_that_cannot_be_written(dowser, tmp_path, statistics, monkeypatch):
    result = dowser("inspect", statistics, "--plot", tmp_path / "out.docx")
    assert result.exit_code == 1 and "must end in one of" in result.stderr
    result = dowser("inspect", statistics, "--plot", tmp_path / "no" / "out.png")
    assert result.exit_code == 1 and "no folder" in result.stderr
    real = builtins.__import__

    def without_matplotlib(name: str, *rest: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    result = dowser("inspect", statistics, "--plot", tmp_path / "out.png")
    assert result.exit_code == 1 and 'pip install "dowser-peft[demo]"' in result.stderr


def test_rho_out_of_range(dowser, statistics):
    result = dowser("inspect", statistics, "--rho", 10)
    assert result.exit_code == 1 and "for 10 % write 0.1" in result.stderr


def _without_mask(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.pop(next(key for key in tensors if key.endswith(".dowser_mask"))))


def _with_a_bit_more(folder: Path) -> None:
    def mark(tensors: dict[str, torch.Tensor]) -> None:
        next(value for key, value in tensors.items() if key.endswith(".dowser_mask"))[0] ^= 1

    _edit(folder, mark)


def _edit(folder: Path, change: object) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _truncated(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _other_method(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_mask, "has no mask for 'model.layers."),
        (_with_a_bit_more, "marks"),
        (_truncated, "truncated or corrupted"),
        (_other_method, "method LORA"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json' is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json' is damaged"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "merge"])
def test_damaged_adapter(dowser, tmp_path, llama_adapter, damage, message, command):
    folder = Path(shutil.copytree(llama_adapter, tmp_path / "adapter"))
    damage(folder)
    result = dowser(command, folder, *(("-o", tmp_path / "out") if command == "merge" else ()))
    assert result.exit_code == 1, result.output
    assert message in result.stderr and result.stderr.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_damaged_statistics(dowser, tmp_path, statistics, llama):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(statistics.read_bytes()[:-10])
    result = dowser("inspect", cut)
    assert result.exit_code == 1 and "truncated or corrupted" in result.stderr
    result = dowser("inspect", llama / "model.safetensors")
    assert result.exit_code == 1 and "not a file of probe statistics" in result.stderr


def test_hint_at_the_subfolder_of_a_named_adapter(dowser, tmp_path, llama_adapter):
    shutil.copytree(llama_adapter, tmp_path / "all" / "french")
    result = dowser("inspect", tmp_path / "all")
    assert result.exit_code == 1 and "['french']" in result.stderr
