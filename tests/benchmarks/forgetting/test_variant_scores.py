from __future__ import annotations

import pytest
import torch

from benchmarks.forgetting import rows, variant_scores
from benchmarks.forgetting.methods import adapters
from benchmarks.forgetting.methods.variants import Variant, paper
from dowser_peft.miniature import load_miniature
from dowser_peft.targets import default_targets
from tests.models import tiny_llama


def test_hamming_by_hand():
    """One bit of four, and none of two."""
    first = {"a": torch.tensor([[True, False, True, False]]), "b": torch.tensor([[True, False]])}
    second = {"a": torch.tensor([[True, True, True, False]]), "b": torch.tensor([[True, False]])}
    assert variant_scores.hamming(first, second) == pytest.approx(1 / 8)


def test_rows_of_the_paper_and_its_opposite(monkeypatch, tmp_path):
    calls = []

    def counted(model, names, data, seed):
        calls.append(seed)
        return paper(model, names, data, seed)

    def opposite(model, names, data, seed):
        return {name: -score for name, score in counted(model, names, data, seed).items()}

    def few(model, names, data, seed):
        return adapters.probe(model, num_prompts=4, prompt_length=8, target_modules=names, seed=seed, progress=False)

    monkeypatch.setattr("benchmarks.forgetting.methods.variants.own_prompts", few)
    monkeypatch.setattr(variant_scores, "load_base", lambda seed, cache: (tiny_llama(), None))
    monkeypatch.setattr(variant_scores, "data_of", lambda *arguments: None)
    monkeypatch.setattr(variant_scores, "paper", counted)
    names = default_targets(tiny_llama())
    none = {name: torch.zeros(tiny_llama().get_submodule(name).weight.shape, dtype=torch.bool) for name in names}
    monkeypatch.setattr(variant_scores, "real_masks", lambda *arguments: {"real": none, "images": none})
    known = {"paper": Variant("Paper's score", counted), "exact": Variant("Opposite", opposite)}
    monkeypatch.setattr(variant_scores, "ALL", known)
    found = [row for rows in variant_scores.measure(0, list(known), tmp_path) for row in rows]
    assert [(row["variant"], row["seed"]) for row in found] == [(name, seed) for name in known for seed in (0, 1, 2)]
    assert calls == [0, 1, 2, 0, 1, 2]  # each score once
    assert [(row["spearman"], row["hamming"]) for row in found[:3]] == [(1.0, 0.0)] * 3
    assert all(row["spearman"] == -1.0 and row["hamming"] == pytest.approx(0.2, abs=0.01) for row in found[3:])
    assert all(0 < row["self"] < 0.18 for row in found)
    assert all(row["real"] == row["images"] == pytest.approx(0.1, abs=0.01) for row in found)
    rows.append(found, tmp_path / "rows.jsonl")
    assert "| Opposite | -1.000 | 0.2" in variant_scores.table(tmp_path / "rows.jsonl")


def test_real_questions_with_images_are_a_reference_of_their_own(monkeypatch):
    model, tokenizer = load_miniature()
    seen = []

    def recorded(model, modules, batches):
        seen.append(batches)
        return adapters.probe(model, batches=batches[:1], num_probes=1, target_modules=modules, progress=False)

    monkeypatch.setattr(variant_scores, "_probe", recorded)
    names = default_targets(model)[:2]
    found = variant_scores.real_masks(model, names, variant_scores.data_of(tokenizer, 0, "style", None))
    assert list(found) == ["real", "images"] and list(found["real"]) == names
    assert [sum(len(batch["input_ids"]) for batch in batches) for batches in seen] == [64, 66]
    assert all(len(batch["pixel_values"]) == len(batch["input_ids"]) for batch in seen[1])
    assert not all("pixel_values" in batch for batch in seen[0])
