from __future__ import annotations

import pytest
import torch

from benchmarks.forgetting import rows, variant_scores
from benchmarks.forgetting.methods import adapters
from benchmarks.forgetting.methods.variants import Variant, paper
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
    known = {"paper": Variant("Paper's score", counted), "exact": Variant("Opposite", opposite)}
    monkeypatch.setattr(variant_scores, "ALL", known)
    found = list(variant_scores.measure(0, list(known), tmp_path))
    assert [(row["variant"], row["seed"]) for row in found] == [(name, seed) for name in known for seed in (0, 1, 2)]
    assert calls == [0, 1, 2, 0, 1, 2]  # each score once
    assert [(row["spearman"], row["hamming"]) for row in found[:3]] == [(1.0, 0.0)] * 3
    assert all(row["spearman"] == -1.0 and row["hamming"] == pytest.approx(0.2, abs=0.01) for row in found[3:])
    assert all(0 < row["self"] < 0.18 for row in found)
    rows.append(found, tmp_path / "rows.jsonl")
    assert "| Opposite | -1.000 | 0.2" in variant_scores.table(tmp_path / "rows.jsonl")
