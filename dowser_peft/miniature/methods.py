"""Ways to fine-tune the miniature. In each the same layers train: the decoder's attention and MLP projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from torch import nn

from dowser_peft.config import DowserConfig
from dowser_peft.targets import default_targets


def full_fine_tuning(model: nn.Module, rho: float, seed: int) -> nn.Module:
    """Every weight of the target layers trains."""
    targets = default_targets(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in targets)
    return model


def lora(model: nn.Module, rho: float, seed: int) -> nn.Module:
    """LoRA of rank 8, on the same layers."""
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=default_targets(model)))


def dowser(model: nn.Module, rho: float, seed: int) -> nn.Module:
    """Model-Dowser with the paper's settings: the fraction ``rho`` of each target layer trains."""
    return get_peft_model(model, DowserConfig(rho=rho, seed=seed))


@dataclass(frozen=True)
class Method:
    """What trains, and how strongly AdamW draws it back to zero."""

    wrap: Callable[[nn.Module, float, int], nn.Module]
    weight_decay: float = 0.0


METHODS = {
    "full fine-tuning": Method(full_fine_tuning),
    "LoRA r=8": Method(lora),
    "Dowser": Method(dowser),
    "Dowser, weight decay 10": Method(dowser, weight_decay=10.0),
}
