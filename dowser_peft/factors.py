"""The factors of the score of each module and expert, also where no prompt came."""

from __future__ import annotations

import warnings

import torch

from dowser_peft.probing import ProbeStatistics


class Factors:
    """The factors (A, Psi) of the score of modules and experts.

    One that no prompt reached is ranked by magnitude. Its statistics are zero, so they say nothing about its weights:
    with both factors unknown and taken to be alike for all of them, |W| is what is left of the score. That is as safe
    as can be told without data. The model itself, writing for itself, never used this expert, so what the probe
    protects does not depend on it; a task that does not use it either gives it no gradient; and a task that does
    moves only the fraction rho of smallest weights. Freezing it instead would protect what only other data could show
    to matter: probe with such data, ``probe(model, batches=...)``, and the expert is reached.
    """

    def __init__(self, statistics: ProbeStatistics | None, activations_only: bool) -> None:
        self._statistics, self._activations_only = statistics, activations_only
        self._unreached: list[str] = []
        self._asked = 0

    def of(self, name: str, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N, in]`` and ``[N, out]``, or one row each."""
        constant = torch.ones(1, shape[1]), torch.ones(1, shape[0])
        if self._statistics is None:  # 'magnitude'
            return constant
        self._asked += 1
        activation, sensitivity = self._statistics.activation(name), self._statistics.sensitivity(name)
        if not activation.any() or not (self._activations_only or sensitivity.any()):
            self._unreached.append(name)
            return constant
        if self._activations_only:  # 'wanda'
            return activation.float().mean(0, keepdim=True), constant[1]
        return activation, sensitivity

    def warn_about_unreached(self) -> None:
        if self._unreached:
            warnings.warn(
                f"no prompt reached {len(self._unreached)} of {self._asked} modules and experts, such as "
                f"{self._unreached[0]!r} (an expert that is never chosen?): their weights are ranked by magnitude",
                stacklevel=3,
            )
