"""The authors' procedure against its description computed directly, and against our estimate of the same numbers."""

from __future__ import annotations

import torch

from benchmarks.speed.authors import AuthorsProbe
from dowser_peft import bitmask, bottom_rho_mask
from dowser_peft.probing import Sampling, collect_statistics
from dowser_peft.targets import default_targets
from tests import models
from tests.probing.helpers import prompts


def direct_scores(
    model: torch.nn.Module, name: str, ids: torch.Tensor, signs: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The score matrix of every iteration; ``signs`` in the order of the iterations."""
    module = model.get_submodule(name)
    scores = []
    order = iter(signs)
    for batch in ids.split(4):
        for _ in range(len(signs) // (len(ids) // 4)):
            kept: dict[str, torch.Tensor] = {}
            handle = module.register_forward_hook(lambda _m, args, z, kept=kept: kept.update(h=args[0], z=z))
            logits = model(batch).logits[:, -1]
            handle.remove()
            (g,) = torch.autograd.grad((logits * next(order)).sum(), kept["z"])
            outer = g.abs().mean((0, 1))[:, None] * kept["h"].abs().mean((0, 1))[None, :]
            scores.append((module.weight.abs() * outer).detach())
    return scores


def test_mean_variance_and_mask_of_the_authors_procedure() -> None:
    model, ids = models.tiny_llama(), prompts(8)
    names = default_targets(model)[3:6]
    model.requires_grad_(True)
    torch.manual_seed(3)
    authors = AuthorsProbe(model, names)
    authors.run(ids, 3)
    torch.manual_seed(3)
    signs = [torch.randint(0, 2, (4, models.VOCABULARY)) * 2.0 - 1 for _ in range(6)]
    masks = authors.masks(0.1)
    for name in names:
        scores = torch.stack(direct_scores(model, name, ids, signs))
        torch.testing.assert_close(authors.scores[name].mean, scores.mean(0), rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(authors.scores[name].variance(), scores.var(0, correction=0), rtol=1e-3, atol=1e-12)
        ordered = scores.mean(0).flatten().sort().values
        k = round(0.1 * ordered.numel())
        assert int(masks[name].sum()) == k
        assert ordered[k - 1] <= authors.scores[name].mean[~masks[name]].min() * (1 + 1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ties_at_the_threshold_are_all_in() -> None:
    model = models.tiny_llama()
    name = default_targets(model)[0]
    authors = AuthorsProbe(model, [name])
    authors.scores[name].mean.fill_(1.0)
    assert bool(authors.masks(0.1)[name].all())


def test_mean_abs_is_an_estimate_of_the_same_scores() -> None:
    """With many vectors both converge to one mean over signs."""
    model, ids = models.tiny_llama(), prompts(4)
    name = default_targets(model)[4]
    torch.manual_seed(0)
    authors = AuthorsProbe(model, [name])
    authors.run(ids, 400)
    module = model.get_submodule(name)
    found = collect_statistics(
        model.requires_grad_(False),
        {name: module},
        {name: tuple(module.weight.shape)},
        num_prompts=4,
        num_probes=400,
        prompt_length=5,
        batches=[{"input_ids": ids}],
        estimator="mean_abs",
        sampling=Sampling(),
        batch_size=None,
        seed=0,
        tokenizer=None,
        progress=False,
    )
    ours = module.weight.detach().abs() * (found.sensitivities[name].T @ found.activations[name])
    difference = (ours - authors.scores[name].mean).norm() / ours.norm()
    assert difference < 0.05
    k = round(0.25 * ours.numel())
    mask = bitmask.unpack(
        bottom_rho_mask(module.weight.detach(), found.activations[name], found.sensitivities[name], 0.25), ours.numel()
    )
    assert int((mask & authors.masks(0.25)[name].flatten()).sum()) > 0.95 * k
