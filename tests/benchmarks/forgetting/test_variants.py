"""Every variant of the score against a computation done another way, and every choice by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from scipy.linalg import hadamard

from benchmarks.forgetting.methods import Data, Settings, adapters, variants
from benchmarks.forgetting.methods.variants import VARIANTS
from dowser_peft import DowserConfig, bitmask, probe
from dowser_peft.importance import select_masks
from dowser_peft.scoring import num_trainable
from dowser_peft.targets import default_targets
from tests.models import tiny_llama, tiny_llava

SEED, TOKENS = 3, 8
RTOL = 1e-6  # of float64 models, whose norms and rotations compute in float32
DATA = Data("tiny/task", None, None, None)  # what a score without data reads of it
MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    monkeypatch.setattr(adapters, "PROMPTS", 12)  # two batches
    monkeypatch.setattr(adapters, "PROMPT_TOKENS", TOKENS)


@pytest.fixture
def all_signs(monkeypatch):
    """Rows of a Hadamard matrix: (1/V) sum_k (h_k^T J)^2 is ||J||^2 exactly, no estimate of it."""
    rows = torch.from_numpy(hadamard(64))
    monkeypatch.setattr(variants, "random_signs", lambda value, *_: (row.expand(value.shape) for row in rows))


def _jacobians(model, name):
    """Of each prompt of the probe: its input h [T, in], d f / d z [V, T, out] and d f / d W [V, out, in]."""
    found = []
    module = model.get_submodule(name)
    for prompt in _prompts(model):
        module.weight.requires_grad_()
        logits, h, z = _watched_logits(model, module, prompt)
        grads = [torch.autograd.grad(value, (z, module.weight), retain_graph=True) for value in logits[-1]]
        of_output, of_weight = (torch.stack(part) for part in zip(*grads, strict=True))
        found.append((h[0], of_output[:, 0], of_weight))
        module.weight.requires_grad_(False)
    return found


def _watched_logits(model, module, prompt):
    """Logits [T, V], and input and output of ``module``."""
    kept = []
    handle = module.register_forward_hook(lambda _, inputs, z: kept.extend([inputs[0].detach(), z]))
    logits = model(prompt).logits[0]
    handle.remove()
    return logits, *kept


def _prompts(model):
    """The prompts that the walk uses, one at a time: recorded, not written again."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]) if kwargs["input_ids"].shape[1] == TOKENS else None,
        with_kwargs=True,
    )
    list(variants.walk(model, [MODULE], SEED))
    handle.remove()
    return torch.cat(seen)[-adapters.PROMPTS :].split(1)


def _double():
    return tiny_llama(vocab_size=64).double().requires_grad_(False)


@pytest.mark.parametrize("name", [MODULE, "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_the_exact_score_is_that_of_the_full_jacobian(all_signs, name):
    model = _double()
    squares = [of_weight.square().sum(0) for *_, of_weight in _jacobians(model, name)]
    assert len(squares) == 12
    expected = model.get_submodule(name).weight.abs() * torch.stack(squares).mean(0).sqrt()
    found = variants.exact(model, default_targets(model), DATA, SEED)[name]
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=0.0)


def test_scores_by_token_from_the_full_jacobian(all_signs):
    model = _double()
    weight = model.get_submodule(MODULE).weight.abs()
    joint, factored, weighted, last = [], [], [], []
    for h, of_output, _ in _jacobians(model, MODULE):
        squares = of_output.square().sum(0)  # [T, out]
        psi = squares.sum(0).sqrt()
        joint.append(sum(torch.outer(squares[t], h[t].square()) for t in range(TOKENS)))
        factored.append(torch.outer(psi, h.abs().mean(0)))
        share = squares.sum(1) / squares.sum()
        weighted.append(torch.outer(psi, sum(share[t] * h[t].abs() for t in range(TOKENS))))
        last.append(torch.outer(psi, h[TOKENS // 2 :].abs().mean(0)))
    expected = {
        "token-weighted": weight * torch.stack(joint).mean(0).sqrt(),
        "token-factored": weight * torch.stack(weighted).mean(0),
        "token-last": weight * torch.stack(last).mean(0),
    }
    for name, value in expected.items():
        found = VARIANTS[name].score(model, [MODULE], DATA, SEED)[MODULE]
        torch.testing.assert_close(found, value, rtol=RTOL, atol=0.0, msg=name)
    found = variants.walked(variants.factored_term)(model, [MODULE], DATA, SEED)[MODULE]
    torch.testing.assert_close(found, weight * torch.stack(factored).mean(0), rtol=RTOL, atol=0.0)


def test_one_token_makes_exact_and_joint_the_same(monkeypatch):
    monkeypatch.setattr(adapters, "PROMPT_TOKENS", 1)
    model = tiny_llama()
    exact, joint = (VARIANTS[name].score(model, [MODULE], DATA, SEED) for name in ("exact", "token-weighted"))
    torch.testing.assert_close(exact[MODULE], joint[MODULE])


def test_prompts_and_signs_are_those_of_the_packages_probe():
    """So that variants differ from the paper's score by the score alone."""
    model = tiny_llama()
    names = default_targets(model)
    statistics = probe(model, num_prompts=12, prompt_length=TOKENS, seed=SEED, progress=False)
    expected = adapters.scores(model, statistics, names)
    found = variants.walked(variants.factored_term)(model, names, DATA, SEED)
    for name in names:  # statistics are kept in bfloat16
        torch.testing.assert_close(found[name] * 12, expected[name], rtol=2**-6, atol=0.0)


def test_all_tokens_are_an_output_of_their_own(monkeypatch):
    """Random signs over [T, V] converge to the norm of the Jacobian of all logits."""
    monkeypatch.setattr(adapters, "PROMPTS", 2)
    monkeypatch.setattr(variants, "PROBES", 64)
    model, terms = _double(), []
    module = model.get_submodule(MODULE)
    module.weight.requires_grad_()
    for prompt in _prompts(model):
        logits, h, z = _watched_logits(model, module, prompt)
        squares = sum(torch.autograd.grad(value, z, retain_graph=True)[0].square() for value in logits.reshape(-1))
        terms.append(torch.outer(squares[0].sum(0).sqrt(), h[0].abs().mean(0)))
    expected = module.weight.detach().abs() * torch.stack(terms).mean(0)
    found = VARIANTS["all-token"].score(model, [MODULE], DATA, SEED)[MODULE]
    last = variants.walked(variants.factored_term)(model, [MODULE], DATA, SEED)[MODULE]
    assert (found / expected).log().abs().mean() < 0.1
    assert (last / expected).log().abs().mean() > 0.5


def test_masks_with_images_are_those_of_the_packages_adapter():
    model = tiny_llava()
    names = default_targets(model)
    masks = VARIANTS["with-images"].masks(model, names, DATA, Settings(lr=0.0, steps=0, seed=SEED))
    expected = select_masks(model, DowserConfig(probe_images=True, seed=SEED), names)
    assert all(torch.equal(bitmask.pack(masks[name]), expected[name]) for name in names)


def test_a_walk_leaves_the_model_as_it_was():
    model = tiny_llama()
    next(iter(variants.walk(model, [MODULE], SEED)))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# --- choices


SCORE = torch.tensor([[1.0, 8.0, 3.0, 9.0], [2.0, 7.0, 6.0, 5.0]])


def test_quotas_by_hand():
    assert variants.each_row({"a": SCORE}, 0.5)["a"].int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]
    assert variants.each_column({"a": SCORE}, 0.5)["a"].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert variants.each({"a": SCORE}, 0.5)["a"].int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]
    assert variants.each({"a": SCORE}, 0.25)["a"].int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]


def test_whole_columns_by_hand():
    """Sums 3, 15, 9 and 14."""
    assert variants.whole_columns({"a": SCORE}, 0.5)["a"].int().tolist() == [[1, 0, 1, 0]] * 2


def test_wider_scopes_by_hand():
    scores = {
        "m.layers.0.q": torch.tensor([[1.0, 2.0]]),
        "m.layers.0.up": torch.tensor([[3.0, 40.0]]),
        "m.layers.1.q": torch.tensor([[0.1, 0.2]]),
        "m.layers.1.up": torch.tensor([[0.3, 0.4]]),
    }

    def chosen(select):
        return [mask.int().flatten().tolist() for mask in select(scores, 0.5).values()]

    assert chosen(variants.each_block) == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert chosen(variants.all_together) == [[0, 0], [0, 0], [1, 1], [1, 1]]
    # Divided by means of 1.5, 21.5, 0.15 and 0.35: (.67 1.33), (.14 1.86), (.67 1.33), (.86 1.14).
    assert chosen(variants.all_relative) == [[1, 0], [1, 0], [1, 0], [1, 0]]
    assert list(variants.each_block(scores, 0.5)) == list(scores)


def test_a_block_is_named_by_its_layer():
    assert variants._block("model.language_model.layers.11.mlp.up_proj") == "model.language_model.layers.11"
    assert variants._block("layers.3.experts.7.up") == "layers.3"
    assert variants._block("head") == "head"


def test_masks_of_unequal_size_train_and_an_empty_one_is_left_out():
    model = tiny_llama()
    names = default_targets(model)
    masks = {name: torch.zeros(model.get_submodule(name).weight.shape, dtype=torch.bool) for name in names}
    masks[names[0]][:] = True
    masks[names[1]][1, 2:5] = True
    tuned = adapters.wrap_with_masks(model, masks, Settings(lr=1e-2, steps=2))
    saved = get_peft_model_state_dict(tuned)
    assert len(saved) == 4  # values and mask of two modules
    for name in names[:2]:
        assert torch.equal(saved[f"base_model.model.{name}.dowser_mask"], bitmask.pack(masks[name]))


def test_every_variant_trains_the_share_rho():
    """Of each matrix, or of all together."""
    model, settings = tiny_llama(), Settings(lr=1e-2, steps=2, seed=SEED, rho=0.25)
    names = default_targets(model)
    for variant in VARIANTS.values():
        cheap = dataclasses.replace(variant, score=lambda model, names, *_: _random(model, names))
        masks = cheap.masks(model, names, DATA, settings)
        assert list(masks) == names
        if variant.select not in (variants.each_block, variants.all_together, variants.all_relative):
            assert all(mask.sum() == num_trainable(mask.numel(), 0.25) for mask in masks.values())
        assert sum(int(mask.sum()) for mask in masks.values()) == sum(mask.numel() for mask in masks.values()) // 4


def _random(model, names):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(model.get_submodule(name).weight.shape, generator=generator) for name in names}
