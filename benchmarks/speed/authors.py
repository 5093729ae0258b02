"""The authors' procedure, written from its description, as the reference that the probe is timed against.

What their published code does (Apache-2.0, nguyendinhson-kaist/Model-Dowser), as far as it matters here:

- prompts in batches of four; per batch and Rademacher vector one forward AND one full backward pass, weight gradients
  of the whole model included;
- per layer mean |h| and mean |g| over the batch and its tokens, *before* their product, and the mean of |g| over R;
- every iteration forms each score matrix |W| * (mean|g| outer mean|h|), copies it to the CPU and updates a float32
  Welford mean and variance there;
- the mask takes every score up to and including the round(rho * numel)-th smallest.

Two things that the description leaves open are settled in its favour: only the logits of the last token are computed,
and a score matrix that is on the CPU already is not copied again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

BATCH_SIZE = 4


@dataclass
class Welford:
    """Running mean and variance of matrices ``[out, in]``, float32 on the CPU."""

    mean: torch.Tensor
    squares: torch.Tensor  # sum of squared deviations from the mean
    count: int = 0

    def update(self, value: torch.Tensor) -> None:
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    def variance(self) -> torch.Tensor:
        return self.squares / self.count


class AuthorsProbe:
    """The scores of ``names``, after any number of iterations; signs come from the global RNG.

    Args:
        model: a causal language model; all its parameters get gradients.
        names: linear layers, ``[out, in]`` weights.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = model.requires_grad_(True)
        self.modules = {name: model.get_submodule(name) for name in names}
        self.scores = {
            name: Welford(*(torch.zeros(module.weight.shape, dtype=torch.float32) for _ in range(2)))
            for name, module in self.modules.items()
        }
        self._activation: dict[str, torch.Tensor] = {}  # mean |h| [in] of the iteration
        self._sensitivity: dict[str, torch.Tensor] = {}  # mean |g| [out]

    def run(self, input_ids: torch.Tensor, num_probes: int) -> None:
        """All iterations: ``[N, tokens]`` prompts in batches of four, ``num_probes`` vectors each."""
        for batch in input_ids.split(BATCH_SIZE):
            for _ in range(num_probes):
                self.iterate(batch)

    def iterate(self, batch: torch.Tensor) -> None:
        """One Rademacher vector for one batch ``[4, tokens]``."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()]
        logits = self.model(batch, use_cache=False, logits_to_keep=1).logits[:, -1]  # [4, vocabulary]
        for handle in handles:
            handle.remove()
        signs = torch.randint(0, 2, logits.shape, device=logits.device).to(logits) * 2 - 1
        (signs * logits).sum().backward()
        for name, module in self.modules.items():
            outer = torch.outer(self._sensitivity[name], self._activation[name])  # [out, in]
            self.scores[name].update((module.weight.detach().abs() * outer).cpu().float())
        self.model.zero_grad()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]
        def on_forward(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self._activation[name] = args[0].detach().abs().mean((0, 1))
            output.register_hook(on_gradient)

        def on_gradient(gradient: torch.Tensor) -> None:
            self._sensitivity[name] = gradient.abs().mean((0, 1))

        return on_forward

    def masks(self, rho: float) -> dict[str, torch.Tensor]:
        """Boolean masks ``[out, in]``: the scores up to the round(rho * numel)-th smallest, ties included."""
        masks = {}
        for name, scores in self.scores.items():
            k = max(1, round(rho * scores.mean.numel()))
            masks[name] = scores.mean <= scores.mean.flatten().kthvalue(k).values
        return masks
