"""The same function in other coordinates: what notices it, and what a score owes to its parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.forgetting import experiment, protocol, regimes, report, rows, transforms
from benchmarks.forgetting.methods import Settings, adapters, variants
from benchmarks.forgetting.methods.variants import VARIANTS
from benchmarks.forgetting.protocol import Case, Scope
from dowser_peft import DowserConfig, probe
from dowser_peft.importance import select_masks
from dowser_peft.miniature import UPSTREAM, load_miniature
from dowser_peft.targets import default_targets
from tests.models import tiny_gpt2, tiny_llama

SIGMA = 1.5
PROBE = {"num_prompts": 8, "prompt_length": 16, "progress": False}


def test_the_rescaled_model_is_the_same_function_bit_for_bit():
    base, other = tiny_llama(), transforms.apply(tiny_llama(), "rescale-1.5")
    ids = torch.randint(3, 90, (3, 12))
    assert torch.equal(base(ids).logits, other(ids).logits)
    before, after = base.state_dict(), other.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("up", "down")}
    for block in ("model.layers.0.mlp.", "model.layers.1.mlp."):
        scale = transforms.scales(block, 24, SIGMA)
        assert torch.equal(after[f"{block}up_proj.weight"], scale[:, None] * before[f"{block}up_proj.weight"])
        assert torch.equal(after[f"{block}down_proj.weight"] * scale, before[f"{block}down_proj.weight"])


def test_scales_are_log_normal_powers_of_two():
    logarithms = transforms.scales("block.", 100_000, 2.0).log2()
    assert torch.equal(logarithms, logarithms.round())
    assert logarithms.mean().item() == pytest.approx(0.0, abs=0.05)
    # Rounding to integers adds a variance of 1/12.
    assert (logarithms.var().item() - 1 / 12) ** 0.5 * torch.tensor(2.0).log().item() == pytest.approx(2.0, rel=0.02)
    assert not torch.equal(transforms.scales("other.", 100_000, 2.0).log2(), logarithms)
    assert torch.equal(transforms.scales("block.", 10, 0.0), torch.ones(10))


def test_the_vision_tower_is_left_alone():
    model, _ = load_miniature()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    transforms.apply(model, "rescale-1")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == 16 and all(".language_model.layers." in name for name in changed)


def test_masks_of_the_paper_do_not_notice_and_those_of_the_weights_do():
    def masks(model, importance):
        config = DowserConfig(importance=importance)
        return select_masks(model, config, default_targets(model))

    base, other = tiny_llama(), transforms.rescale(tiny_llama(), SIGMA)
    statistics, rescaled = probe(base, **PROBE), probe(other, **PROBE)
    names = default_targets(base)
    changed = {
        kind: {name.rpartition(".")[2] for name in names if not torch.equal(first[name], second[name])}
        for kind, first, second in (
            ("dowser", masks(base, statistics), masks(other, rescaled)),
            ("magnitude", masks(base, "magnitude"), masks(other, "magnitude")),
            ("wanda", *(_wanda(model, found) for model, found in ((base, statistics), (other, rescaled)))),
        )
    }
    assert changed == {"dowser": set(), "magnitude": {"up_proj", "down_proj"}, "wanda": {"up_proj"}}


def _wanda(model, statistics):
    return {
        name: adapters.lowest(
            model.get_submodule(name).weight.abs() * statistics.activation(name).float().mean(0), 0.1
        )
        for name in statistics.module_names
    }


def test_the_exact_score_does_not_notice_either(monkeypatch):
    monkeypatch.setattr(adapters, "PROMPTS", 8)
    monkeypatch.setattr(adapters, "PROMPT_TOKENS", 8)
    first, second = (
        VARIANTS["exact"].masks(model, default_targets(model), None, Settings(lr=0.0, steps=0))
        for model in (tiny_llama(), transforms.rescale(tiny_llama(), SIGMA))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert variants.VARIANTS["exact"].select is variants.each


def test_copied_units_are_the_same_function():
    base, other = tiny_llama().double(), transforms.apply(tiny_llama().double(), "copies-4")
    ids = torch.randint(3, 90, (3, 12))
    torch.testing.assert_close(base(ids).logits, other(ids).logits, rtol=1e-12, atol=1e-12)
    mlp = other.model.layers[0].mlp
    assert mlp.up_proj.out_features == mlp.gate_proj.out_features == mlp.down_proj.in_features == 24 + 3 * 6
    columns = mlp.down_proj.weight.T
    copied = [row for row in range(24) if (columns[24:] == columns[row]).all(1).sum() == 3]
    assert copied == sorted(transforms.copied_units("model.layers.0.mlp.", 24)) and len(copied) == 6
    assert torch.equal(columns[copied], base.model.layers[0].mlp.down_proj.weight.T[copied] / 4)
    for layer in (mlp.gate_proj, mlp.up_proj):
        assert all((layer.weight[24:] == layer.weight[row]).all(1).sum() == 3 for row in copied)


def test_the_score_of_a_copy_is_its_share():
    """With the same prompts: J of a copied row is a quarter, and so is W of a copied column."""
    base, other = tiny_llama().double(), transforms.apply(tiny_llama().double(), "copies-4")
    batches = [{"input_ids": torch.randint(3, 90, (4, 12))}]
    first, second = (probe(model, batches=batches, **PROBE) for model in (base, other))
    copied = transforms.copied_units("model.layers.0.mlp.", 24)
    factor = torch.ones(24, dtype=torch.double)
    factor[copied] = 0.25
    up = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(
        second.sensitivity(up)[:, :24].double(), first.sensitivity(up).double() * factor, rtol=1e-4, atol=0
    )
    down = up.replace("up_proj", "down_proj")
    torch.testing.assert_close(second.activation(down)[:, :24], first.activation(down), rtol=1e-4, atol=0)
    torch.testing.assert_close(second.sensitivity(down), first.sensitivity(down), rtol=1e-4, atol=0)


UNKNOWN = ["rescale", "rescale-", "rescale-x", "rescale--1", "rescale-inf", "rotate-1", "copies-0", "copies-1.5"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_transform_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"unknown transform '{name}': there are rescale-SIGMA"):
        transforms.apply(tiny_llama(), name)


def test_a_model_without_a_gated_mlp_says_so():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no gated MLP"):
        transforms.apply(tiny_gpt2(), "rescale-1")


# --- runs on it


def test_a_run_starts_from_the_transformed_base(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(experiment, "load_base", lambda seed, cache, size: (tiny_llama(), None))
    monkeypatch.setattr(experiment, "data_of", lambda *arguments: None)
    monkeypatch.setattr(experiment, "score", lambda model, *arguments: seen.append(model.state_dict()) or {})
    for transform in (None, "rescale-1.5"):
        run = Case("zero-shot", "style", 4, transform=transform).run(None, 0, 0)
        row = experiment.perform(run, tmp_path)
        assert row["status"] == rows.OK and rows.run_of(row) == run
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(seen[0][name], tiny_llama().state_dict()[name])
    assert torch.equal(seen[1][name], transforms.rescale(tiny_llama(), 1.5).state_dict()[name])


def test_rows_of_before_are_of_the_base_as_it_is():
    row = dataclasses.asdict(Case("dowser", "style", 4).run(1e-3, 0, 0))
    del row["transform"], row["size"]
    assert rows.run_of(row) == Case("dowser", "style", 4).run(1e-3, 0, 0)


def test_the_study_shares_the_runs_of_the_base_as_it_is():
    runs = protocol.stages("regimes", Scope())[0].runs([])
    assert {run.transform for run in runs} == {None, "rescale-1", "rescale-2", "copies-4"}
    assert {run.method for run in runs} == set(protocol.IN_REGIMES)
    main = {run for stage in protocol.stages("main", Scope()) for run in stage.runs([])}
    shared = {run.method for run in main & set(runs)}
    assert shared == {"full", "dowser"}
    assert {run.task for stage in protocol.stages("regimes", Scope()) for run in stage.runs([])} == {"style", "rename"}


def test_runs_on_other_coordinates_have_a_table_of_their_own():
    def row(upstream, transform):
        scores = {**dict.fromkeys(UPSTREAM, upstream), "style": 90.0}
        run = Case("wanda", "style", 200, transform=transform).run(1e-3, 0, 0)
        return {**dataclasses.asdict(run), "status": rows.OK, "test": scores, "validation": scores}

    found = [row(90.0, None), row(45.0, "rescale-1")]
    label = r"| Wanda \|W\|\|h\| (without J) |"
    assert f"{label} 0.001 | 90.0 | 90.0 | 90.0 |  | 1 |" in report.main_table(found, "style", "ablation")
    assert f"{label} 90.0 / 90.0 | 45.0 / 60.0 |  |  |" in report.regimes_table(found, "style")


# --- parts of a score


def test_shares_by_hand():
    """Four entries, log2: |W| (1 -1; -1 1), J (2; -2) and h (0; 0): variances 1 and 4."""
    weight = torch.tensor([[2.0, -0.5], [0.5, 2.0]])
    factor = torch.tensor([[4.0, 4.0], [0.25, 0.25]])
    found = regimes.shares(weight, factor)
    expected = {"weight": 0.2, "sensitivity": 0.8, "activation": 0.0, "interaction": 0.0, "weight alone": 0.2}
    assert found == pytest.approx(expected, abs=1e-12)
    found = regimes.shares(torch.ones(2, 2), torch.tensor([[2.0, 0.5], [0.5, 2.0]]))
    assert found == pytest.approx({**dict.fromkeys(expected, 0.0), "interaction": 1.0}, abs=1e-12)
    found = regimes.shares(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.25, 1.0]]))
    assert found["weight"] == pytest.approx(-1.0) and found["activation"] == pytest.approx(2.0)
    assert found["weight alone"] == pytest.approx(1.0)  # two points lie on a line


def test_shares_leave_out_what_is_zero():
    weight, factor = torch.rand(5, 6) + 0.5, torch.rand(5, 6) + 0.5
    smaller = regimes.shares(weight, factor)
    padded_weight, padded_factor = torch.zeros(6, 6), torch.ones(6, 6)
    padded_weight[:5], padded_factor[:5] = weight, factor
    assert regimes.shares(padded_weight, padded_factor) == pytest.approx(smaller)
    assert sum(smaller[part] for part in regimes.PARTS) == pytest.approx(1.0)
    logarithms = torch.stack([weight.double().log().flatten(), (weight * factor).double().log().flatten()])
    assert smaller["weight alone"] == pytest.approx(float(torch.corrcoef(logarithms)[0, 1] ** 2))


def test_overlap_by_hand():
    first = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert regimes.overlap(first, torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 0.5) == 0.5
    assert regimes.overlap(first, -first, 0.5) == 0.0


def test_a_row_of_each_matrix(monkeypatch, tmp_path):
    model = tiny_llama()
    statistics = probe(model, **PROBE)
    name = "model.layers.0.mlp.up_proj"
    found = regimes.of_matrix(regimes._weight(model, name), statistics, name)
    assert set(found) == {*regimes.PARTS, regimes.ALONE, *regimes.OTHERS}
    records = [
        {"pretraining_seed": 0, "transform": transform, "module": name.replace("0", layer), **found}
        for transform in (None, "rescale-1")
        for layer in "01"
    ]
    rows.append(records, tmp_path / "regimes.jsonl")
    shown = regimes.table(tmp_path / "regimes.jsonl").splitlines()
    assert [line.split("|")[1:3] for line in shown[2:]] == [[" up_proj ", "  "], [" up_proj ", " rescale-1 "]]


def test_matrices_that_a_transform_leaves_have_no_row_of_it(monkeypatch, tmp_path):
    monkeypatch.setattr(regimes, "load_base", lambda seed, cache: (tiny_llama(), None))
    monkeypatch.setattr(regimes, "probe", lambda model, **options: probe(model, **{**options, **PROBE}))
    measured = {
        transform: {row["module"].rpartition(".")[2] for row in regimes.measure(0, transform, 0, tmp_path)}
        for transform in regimes.TRANSFORMS
    }
    mlp = {"gate_proj", "up_proj", "down_proj"}
    assert measured[None] == mlp | {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert measured["rescale-2"] == {"up_proj", "down_proj"}
    assert measured["copies-4"] == mlp


def test_what_has_rows_is_not_measured_again(monkeypatch, tmp_path):
    made = []

    def measure(base, transform, seed, cache):
        made.append((base, transform))
        numbers = dict.fromkeys([*regimes.PARTS, regimes.ALONE, *regimes.OTHERS], 0.5)
        yield {"pretraining_seed": base, "transform": transform, "module": "up_proj", **numbers}

    monkeypatch.setattr(regimes, "measure", measure)
    arguments = ["--results", str(tmp_path / "regimes.jsonl"), "--pretraining-seeds"]
    monkeypatch.setattr(regimes, "TRANSFORMS", (None,))
    regimes.main([*arguments, "0"])
    monkeypatch.setattr(regimes, "TRANSFORMS", (None, "copies-4"))
    regimes.main([*arguments, "0", "1"])
    assert made == [(0, None), (0, "copies-4"), (1, None), (1, "copies-4")]
