"""Every method on cases computed by hand, and on a tiny model: which weights it changes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from peft.utils import get_peft_model_state_dict

from benchmarks.forgetting.methods import METHODS, Data, Settings, UnknownNameError, adapters, check_names, full
from benchmarks.forgetting.methods import merging as merging_methods
from benchmarks.forgetting.methods.spider import allocation, soft_rank, spider
from dowser_peft import bitmask
from dowser_peft.miniature.training import NonFiniteLossError, Recipe, train
from dowser_peft.scoring import num_trainable
from dowser_peft.targets import default_targets
from tests.models import BOS, EOS, PAD, VOCABULARY, tiny_llama


class _Tokenizer:
    all_special_ids = [PAD, BOS, EOS]
    bos_token_id = BOS

    def __len__(self):
        return VOCABULARY


def _batches(steps, seed, tokens=6, rows=4):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        input_ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
        yield {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}


def _upstream(count, seed):
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in _batches(count // 4, seed)]


@pytest.fixture
def data(tmp_path):
    return Data("tiny/task", _Tokenizer(), _batches, _upstream, tmp_path)


@pytest.fixture(autouse=True)
def few_random_prompts(monkeypatch):
    for name, value in (("PROMPTS", 8), ("PROMPT_TOKENS", 8), ("PROMPTS_PER_BATCH", 4)):
        monkeypatch.setattr(adapters, name, value)


def _changes(method, data, settings):
    """Name of each weight that the method changed -> mask of its changed entries."""
    before = tiny_llama().state_dict()
    tuned = METHODS[method].tune(tiny_llama(), data, settings)
    if hasattr(tuned, "merge_and_unload"):
        tuned = tuned.merge_and_unload()
    after = tuned.state_dict()
    assert after.keys() == before.keys()
    return {name: after[name] != before[name] for name in before if not torch.equal(after[name], before[name])}


SETTINGS = Settings(lr=1e-2, steps=2, rho=0.25)
# "with-images" needs a model that reads them: test_variants.py.
WITHOUT_IMAGES = [name for name in METHODS if name != "with-images"]
EXACT_RHO = ["magnitude", "wanda", "random", "dowser", "highest", "without-weight", "without-h", "real-data"]
EXACT_RHO += ["random-tokens", "mean-abs", "exact", "token-weighted", "token-factored", "token-last", "all-token"]


@pytest.mark.parametrize("method", [name for name in WITHOUT_IMAGES if name != "zero-shot"])
def test_only_target_weights_change(method, data):
    changed = _changes(method, data, SETTINGS)
    assert set(changed) == {f"{name}.weight" for name in default_targets(tiny_llama())}


@pytest.mark.parametrize("method", EXACT_RHO)
def test_masks_train_the_share_rho_of_each_layer(method, data):
    for mask in _changes(method, data, SETTINGS).values():
        assert mask.sum() == num_trainable(mask.numel(), SETTINGS.rho)


@pytest.mark.parametrize("method", ["full", "grafting", "tailor", "spider", "dowser", "lora", "osf", "highest"])
def test_depth_leaves_the_first_layers_alone(method, data):
    changed = _changes(method, data, dataclasses.replace(SETTINGS, depth=1))
    assert changed and all(".layers.1." in name for name in changed)


def test_zero_shot_changes_nothing(data):
    assert _changes("zero-shot", data, SETTINGS) == {}


def test_the_least_important_weights_are_not_the_most_important(data):
    lowest, highest = _changes("dowser", data, SETTINGS), _changes("highest", data, SETTINGS)
    assert not any(bool((lowest[name] & highest[name]).any()) for name in lowest)


def test_smallest_supertuning_trains_the_weights_of_the_magnitude_mask(data):
    """So that the protocol need not run both; counts differ by rounding alone."""
    smallest, magnitude = _changes("super-bottom", data, SETTINGS), _changes("magnitude", data, SETTINGS)
    for name, mask in smallest.items():
        assert not (mask & ~magnitude[name]).any()
        assert magnitude[name].sum() - mask.sum() <= 1


def test_names_that_are_not_there():
    with pytest.raises(UnknownNameError, match="'graftin'. Did you mean 'grafting'. There are: zero-shot, full"):
        check_names("method", ["full", "graftin"], list(METHODS))


# --- post-merge methods


def test_grafting_keeps_the_largest_of_all_layers():
    delta = {"a": torch.tensor([[1.0, -8.0], [2.0, 3.0]]), "b": torch.tensor([[0.5, -4.0], [5.0, 0.1]])}
    kept = merging_methods.keep_largest(delta, rho=0.25)  # 2 of 8
    assert kept["a"].tolist() == [[0.0, -8.0], [0.0, 0.0]]
    assert kept["b"].tolist() == [[0.0, 0.0], [5.0, 0.0]]


def test_grafting_keeps_exactly_as_many_of_equal_entries():
    delta = {"a": torch.tensor([[2.0, -2.0], [3.0, 0.0]]), "b": torch.tensor([[-2.0, 2.0]])}
    kept = merging_methods.keep_largest(delta, rho=0.5)  # 3 of 6: the 3, and the first two of the twos
    assert kept["a"].tolist() == [[2.0, -2.0], [3.0, 0.0]]
    assert kept["b"].tolist() == [[0.0, 0.0]]


def test_the_kth_largest_is_that_of_a_sort():
    torch.manual_seed(0)
    parts = [torch.randn(40, 30).abs() * 10.0 ** torch.randint(-6, 3, (40, 30)), torch.rand(500), torch.zeros(20)]
    ordered = torch.cat([part.reshape(-1) for part in parts]).sort(descending=True).values
    for k in (1, 2, 7, 100, 1699, 1700, len(ordered)):
        assert merging_methods.kth_largest(parts, k) == ordered[k - 1].item()


def test_dare_drops_and_rescales():
    delta = {"a": torch.full((200, 200), 3.0), "b": torch.full((200, 200), -1.0)}
    patch = merging_methods.drop_and_rescale(delta, rho=0.25, seed=0)
    assert patch["a"].unique().tolist() == [0.0, 12.0]
    assert patch["b"].unique().tolist() == [-4.0, 0.0]
    assert patch["a"].mean() == pytest.approx(3.0, rel=0.05)  # unbiased; five standard errors
    assert not torch.equal(patch["a"] != 0, patch["b"] != 0)
    again, other = (merging_methods.drop_and_rescale(delta, 0.25, seed)["a"] for seed in (0, 1))
    assert torch.equal(again, patch["a"]) and not torch.equal(other, patch["a"])


def test_half_way_is_half_of_the_delta():
    assert merging_methods.interpolate({"a": torch.tensor([[2.0, -6.0]])}, 0.5)["a"].tolist() == [[1.0, -3.0]]


def test_tailored_patch_by_hand():
    """H = [[2, 1], [1, 2]] is damped to 2.02 on its diagonal. Entry 0 is larger and as sensitive: it stays, and takes
    (H D)_0 / H_00 = (2.02 * 3 + 1 * 1) / 2.02."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    patch = merging_methods.tailored_patch(torch.tensor([[3.0, 1.0]]), hessian, rho=0.5)
    assert patch[0, 1] == 0.0
    assert patch[0, 0].item() == pytest.approx((2.02 * 3.0 + 1.0) / 2.02)


def test_tailored_patch_heeds_sensitivity():
    """Without correlations there is nothing to compensate. Inputs of 10^2 make |D| = 2 outweigh |D| = 3:
    salience standardised (3 2 1)/1 -> (1 0 -1); sensitivity about (9 400 1) -> (-0.56 1.15 -0.59)."""
    patch = merging_methods.tailored_patch(
        torch.tensor([[3.0, 2.0, 1.0]]), torch.diag(torch.tensor([1.0, 100.0, 1.0])), 1 / 3
    )
    assert patch[0].tolist() == pytest.approx([0.0, 2.0, 0.0])


def test_tailored_patch_is_the_best_one_on_its_support():
    torch.manual_seed(0)
    inputs = torch.randn(500, 6) @ torch.randn(6, 6)
    hessian, delta = inputs.T @ inputs / 500, torch.randn(4, 6)
    patch = merging_methods.tailored_patch(delta, hessian, rho=0.5)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6)

    def loss(candidate):
        error = delta - candidate
        return torch.einsum("oi,ij,oj->", error, damped, error)

    support = patch != 0
    assert support.sum() == 12
    assert loss(patch) < loss(torch.where(support, delta, 0.0))  # what it would be without compensation
    for _ in range(20):
        assert loss(patch) < loss(patch + 0.05 * support * torch.randn(4, 6))


def test_second_moments_are_of_real_tokens(data):
    model = tiny_llama()
    name = "model.layers.0.self_attn.q_proj"
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))

    def padded(steps, seed):
        for batch in _batches(steps, seed):
            batch["attention_mask"][:, -2:] = 0
            yield batch

    padded_data = dataclasses.replace(data, train=padded)
    moment = merging_methods.input_second_moments(model, [name], padded_data, seed=0)[name]
    x = torch.cat([inputs[:, :-2].reshape(-1, inputs.shape[-1]) for inputs in seen]).double()
    torch.testing.assert_close(moment, x.T @ x / len(x))


def test_one_full_run_serves_all_post_merge_methods(data, monkeypatch):
    runs = []
    monkeypatch.setattr(full, "train", lambda *args, **kwargs: runs.append(1) or train(*args, **kwargs))
    first = _changes("full", data, SETTINGS)
    for method in ("grafting", "dare", "tailor", "half-way"):
        _changes(method, data, SETTINGS)
    assert len(runs) == 1
    assert _changes("full", data, SETTINGS).keys() == first.keys()
    for other in ({"lr": 2e-2}, {"seed": 1}, {"steps": 3}, {"depth": 1}):
        _changes("grafting", data, dataclasses.replace(SETTINGS, **other))
    assert len(runs) == 5


def test_a_full_run_leaves_the_base_as_it_was(data):
    model, untouched = tiny_llama(), tiny_llama().state_dict()
    delta = full.full_delta(model, data, SETTINGS)
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    tuned = METHODS["full"].tune(tiny_llama(), data, SETTINGS)
    name = next(iter(delta))
    torch.testing.assert_close(tuned.get_submodule(name).weight - model.get_submodule(name).weight, delta[name])


def test_full_fine_tuning_is_what_plain_training_gives(data):
    expected = tiny_llama()
    full.train_targets(expected, None)
    train(expected, _batches(SETTINGS.steps, SETTINGS.seed), steps=SETTINGS.steps, lr=SETTINGS.lr)
    tuned = METHODS["full"].tune(tiny_llama(), data, SETTINGS)
    for (name, value), wanted in zip(tuned.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, msg=name)


# --- weights in bfloat16

BFLOAT16 = dataclasses.replace(SETTINGS, recipe=Recipe("cosine", 0.5, accumulation=2, bfloat16=True))


def _bfloat16_llama():
    """Its linear layers hold weights that bfloat16 represents."""
    return tiny_llama().bfloat16()


IN_BFLOAT16 = ["full", "grafting", "dare", "tailor", "spider", "dowser", "dowser-column"]
IN_BFLOAT16 += ["lora", "shira", "super-bottom", "osf", "highest"]  # the others share their code


@pytest.mark.parametrize("method", IN_BFLOAT16)
def test_methods_tune_weights_in_bfloat16(method, data):
    before = _bfloat16_llama().state_dict()
    tuned = METHODS[method].tune(_bfloat16_llama(), data, BFLOAT16)
    if hasattr(tuned, "merge_and_unload"):
        tuned = tuned.merge_and_unload()
    after = tuned.state_dict()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in default_targets(tiny_llama())}


def test_weights_in_bfloat16_train_as_float32(data):
    """A step of 1e-4 is less than half of what separates two weights of 0.1 in bfloat16: there it would be lost."""
    settings = dataclasses.replace(BFLOAT16, lr=1e-4)
    model = _bfloat16_llama()
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    delta = full.full_delta(model, data, settings)
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    for name, change in delta.items():
        assert change.dtype == torch.float32 and (change != 0).float().mean() > 0.9, name
        assert change.abs().max() < 4e-4

    plain = _bfloat16_llama().float()  # the same, if a float32 model had these weights, but for bfloat16 activations
    expected = full.full_delta(
        plain,
        dataclasses.replace(data, cache=None),
        dataclasses.replace(settings, recipe=Recipe("cosine", 0.5, accumulation=2)),
    )
    agreement = [
        torch.nn.functional.cosine_similarity(delta[name].view(-1), expected[name].view(-1), dim=0) for name in delta
    ]
    assert min(agreement) > 0.9


def test_another_recipe_is_another_full_run(data, monkeypatch):
    runs = []
    monkeypatch.setattr(full, "train", lambda *args, **kwargs: runs.append(1) or train(*args, **kwargs))
    for recipe in (Recipe(), Recipe("cosine"), Recipe("cosine", 0.5), Recipe()):
        full.full_delta(tiny_llama(), data, dataclasses.replace(SETTINGS, recipe=recipe))
    assert len(runs) == 3


# --- SPIDER


def test_soft_rank_by_hand():
    """|x| = (0, 2): mean 1, standard deviation sqrt(2), so the ranks are sigmoid(-+ 1 / sqrt(2))."""
    expected = torch.sigmoid(torch.tensor([-1.0, 1.0]) / 2**0.5)
    torch.testing.assert_close(soft_rank(torch.tensor([0.0, -2.0])), expected)
    assert soft_rank(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_allocation_by_hand():
    """G / (I + G) is 0.8 and 0.6 where G > I; their mean is 0.7; more than the mean is cut to 1."""
    share = allocation(torch.tensor([0.2, 0.2, 0.5]), torch.tensor([0.8, 0.3, 0.1]))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.6 / 0.7, 0.0]))
    assert allocation(torch.tensor([0.5]), torch.tensor([0.1])).tolist() == [0.0]


def test_spider_by_hand(data):
    """After each of two steps every weight is drawn back by the ranks of the gradients summed so far."""
    base, plain = tiny_llama(), tiny_llama()
    full.train_targets(plain, None)
    trained = {name: weight for name, weight in plain.named_parameters() if weight.requires_grad}
    sums = {name: torch.zeros_like(weight) for name, weight in trained.items()}

    @torch.no_grad()
    def draw_back():
        for name, weight in trained.items():
            sums[name] += weight.grad
            share = allocation(soft_rank(base.get_parameter(name)), soft_rank(sums[name]))
            weight.copy_((1 - share) * base.get_parameter(name) + share * weight)

    assert SETTINGS.steps == 2
    train(plain, _batches(2, SETTINGS.seed), steps=2, lr=SETTINGS.lr, after_step=draw_back)
    tuned = spider(tiny_llama(), data, SETTINGS)
    for name, weight in trained.items():
        torch.testing.assert_close(tuned.get_parameter(name), weight)


# --- adapters


def test_shira_rank_by_hand():
    """160 x 160 at rho 0.1: 2560 weights of 320 a rank. With 432 x 160: (2560 + 6912) / (320 + 592) = 10.4."""
    assert adapters.shira_rank([(160, 160)], 0.1) == 8
    assert adapters.shira_rank([(160, 160), (432, 160)], 0.1) == 10
    assert adapters.shira_rank([(4, 4)], 0.01) == 1


def test_lowest_breaks_ties_by_position():
    score = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.5]])
    assert adapters.lowest(score, rho=0.5).tolist() == [[False, True, False], [True, False, True]]


def test_scores_by_hand():
    """Psi = (2, 3), A = (1, 10), one prompt: S_ij = |W_ij| Psi_i A_j."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2, bias=False)})
    model["layer"].weight.data = torch.tensor([[1.0, -2.0], [-3.0, 4.0]])
    statistics = SimpleNamespace(
        sensitivity=lambda name: torch.tensor([[2.0, 3.0]]), activation=lambda name: torch.tensor([[1.0, 10.0]])
    )
    assert adapters.scores(model, statistics, ["layer"])["layer"].tolist() == [[2.0, 40.0], [9.0, 120.0]]
    without = adapters.scores(model, statistics, ["layer"], weight=False)["layer"]
    assert without.tolist() == [[2.0, 20.0], [3.0, 30.0]]


def test_given_masks_train_and_nothing_else(data):
    model = tiny_llama()
    names = default_targets(model)
    masks = {name: torch.rand(model.get_submodule(name).weight.shape) < 0.25 for name in names}
    masks = {name: adapters.lowest(torch.where(mask, 0.0, 1.0), 0.25) for name, mask in masks.items()}
    tuned = adapters.wrap_with_masks(model, masks, SETTINGS)
    saved = get_peft_model_state_dict(tuned)
    for name, mask in masks.items():
        assert torch.equal(saved[f"base_model.model.{name}.dowser_mask"], bitmask.pack(mask))
    train(tuned, _batches(2, 0), steps=2, lr=1e-2)
    merged = tuned.merge_and_unload().state_dict()
    for name, value in tiny_llama().state_dict().items():
        changed = merged[name] != value
        expected = masks.get(name.removesuffix(".weight"), torch.zeros_like(changed))
        assert torch.equal(changed, expected), name


def test_without_activations_every_input_counts_the_same(data):
    model = tiny_llama()
    names = default_targets(model)
    statistics = adapters.without_activations(adapters.own_prompts(model, names, data, 0))
    assert all(bool((value == 1).all()) for value in statistics.activations.values())
    assert len({value.min().item() for value in statistics.sensitivities.values()}) > 1


def test_random_prompts_hold_no_special_token_but_bos():
    batches = adapters.random_token_batches(Data("", _Tokenizer(), _batches, _upstream), seed=0)
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    assert tokens.shape == (8, 8)
    assert (tokens[:, 0] == BOS).all() and tokens[:, 1:].min() > EOS
    again = adapters.random_token_batches(Data("", _Tokenizer(), _batches, _upstream), seed=1)
    assert not torch.equal(again[0]["input_ids"], batches[0]["input_ids"])


@pytest.mark.parametrize("method", ["dowser-column", "magnitude-column", "wanda-column", "random-column"])
def test_columns_change_as_a_whole(method, data):
    for mask in _changes(method, data, SETTINGS).values():
        share = mask.float().mean(0)  # of each input column
        assert ((share == 0) | (share > 0.9)).all()  # a gradient can be exactly zero
        assert (share > 0).sum() == max(1, round(SETTINGS.rho * mask.shape[1]))


def test_a_loss_that_is_no_number_stops_the_training():
    model = tiny_llama()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match="the loss became nan at step 1 of 3 with lr=0.01"):
        train(model, _batches(3, 0), steps=3, lr=1e-2)


def test_decayed_methods_hand_their_decay_to_training():
    seen = []
    tune = adapters.decayed(lambda model, data, settings: seen.append(settings), 100.0)
    tune(None, None, Settings(lr=1e-3, steps=1, recipe=Recipe(warmup=0.5)))
    assert seen == [Settings(lr=1e-3, steps=1, recipe=Recipe(warmup=0.5, weight_decay=100.0))]


def test_a_delta_of_all_weights_trains_as_full_fine_tuning_does(data):
    wrapped = adapters.all_weights(tiny_llama(), data, SETTINGS).merge_and_unload().state_dict()
    for name, value in METHODS["full"].tune(tiny_llama(), data, SETTINGS).state_dict().items():
        torch.testing.assert_close(wrapped[name], value, rtol=1e-4, atol=1e-5, msg=name)
