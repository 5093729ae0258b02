"""Every method of the benchmark, by name, in the order of the tables.

``METHODS[name].tune(model, data, settings)`` takes a base model, which it may change, and returns the tuned one.
"Without J" of the ablations is the score |W| |h|, that is ``wanda``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from benchmarks.forgetting.methods import adapters, full, merging
from benchmarks.forgetting.methods.interface import Batch, Data, Settings, Tune, target_modules
from benchmarks.forgetting.methods.spider import spider
from benchmarks.forgetting.methods.task_aware import TASK_AWARE
from benchmarks.forgetting.methods.variants import VARIANTS

Group = Literal["paper", "peft", "column", "ablation", "variant", "decay"]
TITLES: dict[Group, str] = {
    "paper": "Paper's methods",
    "peft": "PEFT",
    "column": "Columns",
    "ablation": "Ablations and controls",
    "variant": "Variants of the score and of the choice",
    "decay": "Weight decay of the delta",
}

# Where each sweep starts; it goes on where the best rate is at an end (see protocol.py).
FULL_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
MERGE_RATES = (2e-4, 4e-4, 8e-4, 1.6e-3)  # a part of the delta must have been a larger one
LORA_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
MASK_RATES = (5e-4, 1e-3, 2e-3, 4e-3)

# Weight decay that draws the delta to zero (of LoRA both factors), and the methods that are tried with it.
DECAYS = (3, 10, 30, 100)
DECAYED = {
    "full": adapters.all_weights,
    "dowser": adapters.dowser,
    "super-bottom": adapters.magnitude,
    "random": adapters.random,
    "lora": adapters.lora,
}


@dataclass(frozen=True)
class Method:
    """A method and what the protocol must know of it.

    Args:
        label: as in tables and figures.
        group: which table it belongs to; "paper", "peft" and "column" are the main one.
        tune: the method.
        rates: first learning rates of its sweep; none for a method that does not train.
        after_full: acts on the delta of a full fine-tuning run, which all such methods share.
        has_rho: changes a share rho of the weights.
    """

    label: str
    group: Group
    tune: Tune
    rates: tuple[float, ...]
    after_full: bool = False
    has_rho: bool = True


def zero_shot(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
    """The base model as it is."""
    return model.requires_grad_(False)


METHODS: dict[str, Method] = {
    "zero-shot": Method("Zero-shot", "paper", zero_shot, (), has_rho=False),
    "full": Method("Full fine-tuning", "paper", full.full_fine_tuning, FULL_RATES, after_full=True, has_rho=False),
    "grafting": Method("Grafting", "paper", merging.grafting, MERGE_RATES, after_full=True),
    "dare": Method("DARE", "paper", merging.dare, MERGE_RATES, after_full=True),
    "tailor": Method("Model Tailor", "paper", merging.model_tailor, MERGE_RATES, after_full=True),
    "half-way": Method("Half-way (WiSE-FT)", "paper", merging.half_way, MERGE_RATES, after_full=True, has_rho=False),
    "spider": Method("SPIDER", "paper", spider, FULL_RATES, has_rho=False),
    "dowser": Method("Dowser", "paper", adapters.dowser, MASK_RATES),
    "lora": Method("LoRA r=8", "peft", adapters.lora, LORA_RATES, has_rho=False),
    "shira": Method("SHiRA (random)", "peft", adapters.shira, MASK_RATES),
    "super-top": Method("Super-Tuning (largest |W|)", "peft", adapters.supertuning_largest, MASK_RATES),
    "super-bottom": Method("Super-Tuning (smallest |W|)", "peft", adapters.supertuning_smallest, MASK_RATES),
    "osf": Method("OSF", "peft", adapters.osf, LORA_RATES, has_rho=False),
    "dowser-column": Method("Dowser columns", "column", adapters.dowser_columns, MASK_RATES),
    "magnitude-column": Method("|W| columns", "column", adapters.magnitude_columns, MASK_RATES),
    "wanda-column": Method("Wanda columns", "column", adapters.wanda_columns, MASK_RATES),
    "random-column": Method("Random columns", "column", adapters.random_columns, MASK_RATES),
    "wanda": Method("Wanda |W||h| (without J)", "ablation", adapters.wanda, MASK_RATES),
    "magnitude": Method("|W| only", "ablation", adapters.magnitude, MASK_RATES),
    "random": Method("Random mask", "ablation", adapters.random, MASK_RATES),
    "highest": Method("Highest S", "ablation", adapters.highest, MASK_RATES),
    "real-data": Method("Real data", "ablation", adapters.real_data, MASK_RATES),
    "random-tokens": Method("Random tokens", "ablation", adapters.random_prompts, MASK_RATES),
    "mean-abs": Method("mean_abs estimator", "ablation", adapters.mean_abs, MASK_RATES),
    "without-weight": Method("Without |W|", "ablation", adapters.without_weight, MASK_RATES),
    "without-h": Method("Without h", "ablation", adapters.without_h, MASK_RATES),
    **{
        name: Method(variant.label, "variant", variant.tune, MASK_RATES)
        for name, variant in {**VARIANTS, **TASK_AWARE}.items()
    },
}
METHODS |= {
    f"{name}-decay-{decay}": replace(
        METHODS[name],
        label=f"{METHODS[name].label}, decay {decay}",
        group="decay",
        tune=adapters.decayed(tune, decay),
        after_full=False,
    )
    for name, tune in DECAYED.items()
    for decay in DECAYS
}


class UnknownNameError(ValueError):
    """A method or task that the benchmark does not have."""


def check_names(kind: str, wanted: list[str], known: list[str]) -> None:
    """Refuse names that are not ``known``.

    Raises:
        UnknownNameError: naming the first, what it may have meant, and all that there are.
    """
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(f"unknown {kind} {name!r}.{hint} There are: {', '.join(known)}")


__all__ = [
    "METHODS",
    "TITLES",
    "Batch",
    "Data",
    "Method",
    "Settings",
    "UnknownNameError",
    "check_names",
    "target_modules",
]
