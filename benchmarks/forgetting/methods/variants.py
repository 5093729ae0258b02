"""Variants of the paper's score and of how masks are chosen by it: what might keep more of the old tasks?

The paper's score treats the tokens of a prompt apart: sensitivities g_t = d(xi^T f)/dz_t and inputs h_t are reduced
over tokens t first, and multiplied then. All scores here are |W| times a factor ``[out, in]``, a mean over prompts n
of the same prompts and Rademacher vectors r as the paper's:

    paper            mean_n sqrt(mean_r sum_t g_ti^2) * mean_t |h_tj|
    exact            sqrt(mean_n mean_r (sum_t g_ti h_tj)^2) = root mean square of d(xi^T f)/dW_ij: the exact
                     first-order effect of a relative change of the weight
    token-weighted   sqrt(mean_n mean_r sum_t g_ti^2 h_tj^2): the exact one without the products of two tokens
    token-factored   the paper's, tokens of |h| weighted by w_t = sum_r sum_i g_ti^2, sum_t w_t = 1: still two
                     small factors a layer
    token-last       the paper's, |h| of the last half of the tokens
    all-token        the paper's, with f the logits of all tokens instead of the last one's
    with-images      the paper's, each prompt behind an image of noise

and of the choice, by the paper's score unless it says otherwise:

    row-quota        the lowest rho inside each output row;   column-quota   inside each input column
    scope-block      the lowest rho of all matrices of a decoder layer together;   scope-global   of all matrices
    scope-relative   of all matrices, scores divided by their mean over the matrix
    exact-column     whole input columns of lowest summed exact score

Quotas are rounded by row or column, so that they train up to half a weight more or less in each. A matrix of which a
wider scope chooses nothing is not adapted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from benchmarks.forgetting.methods import adapters
from benchmarks.forgetting.methods.adapters import Masks, lowest, masked, own_prompts
from benchmarks.forgetting.methods.interface import Batch, Data, Settings, Tune
from dowser_peft import probe
from dowser_peft.probing import Sampling
from dowser_peft.probing.collect import random_signs
from dowser_peft.probing.forward import probed_output, split, token_masks
from dowser_peft.probing.prompts import synthetic_inputs
from dowser_peft.probing.restoring import as_it_came
from dowser_peft.scoring import num_trainable

PROBES = 8
BATCH = 8  # prompts; all R gradients of a batch are held at once

Scores = dict[str, Tensor]  # module name -> [out, in]
Score = Callable[[nn.Module, list[str], Data, int], Scores]  # ..., seed
Select = Callable[[Scores, float], Masks]  # ..., rho
Output = Callable[[nn.Module, Batch], Tensor]
# h [B, T, in], gradients of each of R sign vectors [B, T, out] -> sum over prompts [out, in]
Term = Callable[[Tensor, list[Tensor]], Tensor]


# --- what is summed over prompts


def exact_term(h: Tensor, gradients: list[Tensor]) -> Tensor:
    return sum((g.transpose(1, 2) @ h).square().sum(0) for g in gradients) / len(gradients)  # [B, out, in] each


def joint_term(h: Tensor, gradients: list[Tensor]) -> Tensor:
    squares = _mean_square(gradients)
    return squares.flatten(0, 1).T @ h.square().flatten(0, 1)  # [out, B T] @ [B T, in]


def factored_term(h: Tensor, gradients: list[Tensor]) -> Tensor:
    return _sensitivity(gradients).T @ h.abs().mean(1)  # [out, B] @ [B, in]


def last_half_term(h: Tensor, gradients: list[Tensor]) -> Tensor:
    return factored_term(h[:, h.shape[1] // 2 :], gradients)


def weighted_term(h: Tensor, gradients: list[Tensor]) -> Tensor:
    tokens = _mean_square(gradients).sum(2)  # [B, T]
    share = tokens / tokens.sum(1, keepdim=True).clamp_min(torch.finfo(tokens.dtype).tiny)
    return _sensitivity(gradients).T @ torch.einsum("bt,bti->bi", share, h.abs())


def _mean_square(gradients: list[Tensor]) -> Tensor:
    """[B, T, out]"""
    return sum(g.square() for g in gradients) / len(gradients)


def _sensitivity(gradients: list[Tensor]) -> Tensor:
    """psi, [B, out]"""
    return _mean_square(gradients).sum(1).sqrt()


# --- scores


def last_logits(model: nn.Module, inputs: Batch) -> Tensor:
    """f of the paper, ``[B, V]``."""
    return probed_output(model, inputs, token_masks(model, inputs))[0]


def all_logits(model: nn.Module, inputs: Batch) -> Tensor:
    """``[B, T, V]``"""
    return model(**inputs, use_cache=False).logits


def walk(
    model: nn.Module, names: list[str], seed: int, output: Output = last_logits
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Each module, its input and the gradients of its output, batch by batch of the probe's own prompts.

    Prompts and sign vectors are those of ``probe(model, seed=seed)``; prompts are of one length, without padding.

    Yields:
        Name, h ``[B, T, in]``, and g ``[B, T, out]`` of each sign vector.
    """
    with as_it_came(model, seed):
        prompts = synthetic_inputs(
            model, num_prompts=adapters.PROMPTS, prompt_length=adapters.PROMPT_TOKENS, sampling=Sampling()
        )
        for batch in split(prompts, BATCH):
            with _watched(model, names) as seen:
                value = output(model, batch.inputs)
            found = [
                torch.autograd.grad(value, [z for _, z in seen.values()], signs.to(value.dtype), retain_graph=True)
                for signs in random_signs(value, None, PROBES, seed, batch.first_prompt)
            ]
            for (name, (h, _)), gradients in zip(seen.items(), zip(*found, strict=True), strict=True):
                yield name, h, list(gradients)


@contextmanager
def _watched(model: nn.Module, names: list[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of ``names`` in the forward pass inside; the graph starts at the first of the outputs."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0].detach(), output if output.requires_grad else output.requires_grad_())

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: watch(name, inputs, output)
        )
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def walked(term: Term, *, root: bool = False, output: Output = last_logits) -> Score:
    """|W| times the mean of ``term`` over prompts, or the root of that mean."""

    def score(model: nn.Module, names: list[str], data: Data, seed: int) -> Scores:
        sums: Scores = {}
        for name, h, gradients in walk(model, names, seed, output):
            found = term(h, gradients)
            sums[name] = sums[name].add_(found) if name in sums else found
        means = {name: sums[name] / adapters.PROMPTS for name in names}
        return {
            name: model.get_submodule(name).weight.detach().abs() * (mean.sqrt() if root else mean)
            for name, mean in means.items()
        }

    return score


def paper(model: nn.Module, names: list[str], data: Data, seed: int) -> Scores:
    """The paper's score, by the package."""
    return adapters.scores(model, own_prompts(model, names, data, seed), names)


def with_images(model: nn.Module, names: list[str], data: Data, seed: int) -> Scores:
    """The paper's score, each prompt behind an image of noise."""
    statistics = probe(model, images=True, target_modules=names, seed=seed, progress=False)
    return adapters.scores(model, statistics, names)


# --- which weights


def each(scores: Scores, rho: float) -> Masks:
    """The lowest ``rho`` of each matrix: the paper's choice."""
    return {name: lowest(score, rho) for name, score in scores.items()}


def each_row(scores: Scores, rho: float) -> Masks:
    return {name: _lowest_of_rows(score, rho) for name, score in scores.items()}


def each_column(scores: Scores, rho: float) -> Masks:
    return {name: _lowest_of_rows(score.T, rho).T.contiguous() for name, score in scores.items()}


def _lowest_of_rows(score: Tensor, rho: float) -> Tensor:
    chosen = score.sort(dim=1, stable=True).indices[:, : num_trainable(score.shape[1], rho)]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)


def whole_columns(scores: Scores, rho: float) -> Masks:
    """``round(rho * in)`` columns of lowest sum."""
    return {
        name: lowest(score.double().sum(0), rho)[None].expand(score.shape).contiguous()
        for name, score in scores.items()
    }


def each_block(scores: Scores, rho: float) -> Masks:
    """The lowest ``rho`` of all matrices of a decoder layer."""
    masks: Masks = {}
    for _, names in groupby(sorted(scores, key=_block), key=_block):
        masks |= all_together({name: scores[name] for name in names}, rho)
    return {name: masks[name] for name in scores}


def _block(name: str) -> str:
    """Up to the first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj``."""
    return name[: match.end()] if (match := re.search(r"\.\d+(?=\.)", name)) else name


def all_together(scores: Scores, rho: float) -> Masks:
    """The lowest ``rho`` of all matrices; ties go to the first."""
    chosen = lowest(torch.cat([score.reshape(-1) for score in scores.values()]), rho)
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view_as(score) for (name, score), part in zip(scores.items(), parts, strict=True)}


def all_relative(scores: Scores, rho: float) -> Masks:
    return all_together({name: score / score.mean() for name, score in scores.items()}, rho)


@dataclass(frozen=True)
class Variant:
    """A score and a choice by it."""

    label: str
    score: Score
    select: Select = each

    def masks(self, model: nn.Module, names: list[str], data: Data, settings: Settings) -> Masks:
        return self.select(self.score(model, names, data, settings.seed), settings.rho)

    @property
    def tune(self) -> Tune:
        return masked(self.masks)


exact = walked(exact_term, root=True)

VARIANTS = {
    "exact": Variant("Exact score", exact),
    "exact-column": Variant("Exact score, columns", exact, whole_columns),
    "token-weighted": Variant("Sum over tokens of g² h²", walked(joint_term, root=True)),
    "token-factored": Variant("h weighted by sensitivity", walked(weighted_term)),
    "token-last": Variant("h of the last half", walked(last_half_term)),
    "all-token": Variant("Logits of all tokens", walked(factored_term, output=all_logits)),
    "with-images": Variant("Prompts behind images", with_images),
    "row-quota": Variant("Lowest of each row", paper, each_row),
    "column-quota": Variant("Lowest of each column", paper, each_column),
    "scope-block": Variant("Lowest of each layer's matrices", paper, each_block),
    "scope-global": Variant("Lowest of all matrices", paper, all_together),
    "scope-relative": Variant("Lowest of all, by matrix mean", paper, all_relative),
}
