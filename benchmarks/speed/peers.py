"""What people fine-tune with today, and Dowser, behind one interface.

Every method trains the same layers (the attention and MLP projections of the decoder) of the same model with the
same AdamW. ``k`` is Dowser's count of trained weights, round(rho * numel) per layer; methods with a rank get the one
whose total count is nearest to the total of ``k``.

    dense floor                 forward and backward with dense weight gradients; no optimizer
    full fine-tuning            every weight of the target layers trains
    masked full fine-tuning     the authors' code: the same, and a hook multiplies the gradient by the mask;
                                gradients and Adam states stay dense
    PEFT SHiRA                  random positions, an effective weight per layer kept for the backward
    PEFT Super-Tuning           the k largest weights of each layer, likewise
    LoRA, same count            rank chosen for the same count
    LoRA r=64                   a rank people choose
    PEFT OSF                    the lowest singular directions, same count
    Dowser, Dowser column       ours; scored by |W|, because the time of a step does not depend on the score

Weights of a bfloat16 model that train themselves get float32 master weights (:class:`MasterAdamW`); the values of an
adapter are float32 in every method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig, OSFConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import Tensor, nn

from dowser_peft import DowserConfig
from dowser_peft.base_layer import linear_shape
from dowser_peft.scoring import num_trainable
from dowser_peft.targets import default_targets

LEARNING_RATE = 1e-3


class MasterAdamW:
    """AdamW on float32 copies of low-precision parameters: what trains bfloat16 weights without losing updates.

    One parameter after the other, so that a single float32 gradient is alive at a time: the leanest form.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        self._parameters = list(parameters)
        self._masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
        self._optimizers = [adamw([master], lr) for master in self._masters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master, optimizer in zip(self._parameters, self._masters, self._optimizers, strict=True):
            if parameter.grad is None:
                continue
            master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            master.grad = None
            parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def adamw(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """The fused AdamW, fastest and leanest of torch's, without weight decay."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)


class Trainable:
    """A model with an optimizer over whatever requires a gradient."""

    def __init__(self, model: nn.Module, *, lr: float = LEARNING_RATE, optimise: bool = True) -> None:
        self.model = model.train()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained_parameters = sum(parameter.numel() for parameter in self._trained)
        low_precision = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self._trained)
        self._optimizer: MasterAdamW | torch.optim.AdamW | None = None
        if optimise:
            self._optimizer = MasterAdamW(self._trained, lr) if low_precision else adamw(self._trained, lr)

    def step(self, ids: Tensor) -> Tensor:
        """Forward, backward and optimizer step on token ids ``[batch, tokens]``; the loss, without a graph."""
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
        for parameter in self._trained:
            parameter.grad = None
        return loss.detach()


def same_count_rank(model: nn.Module, rho: float) -> int:
    """The rank r for which sum r * (in + out) over the target layers is nearest to the sum of round(rho * numel)."""
    shapes = [linear_shape(model.get_submodule(name)) for name in default_targets(model)]
    trained = sum(num_trainable(out * in_, rho) for out, in_ in shapes)
    return max(1, round(trained / sum(out + in_ for out, in_ in shapes)))


def target_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Target layer -> its weight ``[out, in]``."""
    return {name: model.get_parameter(f"{name}.weight") for name in default_targets(model)}


def smallest_weights(model: nn.Module, rho: float) -> dict[str, Tensor]:
    """Target layer -> bool mask ``[out, in]`` of exactly its round(rho * numel) smallest weights."""
    masks = {}
    for name, weight in target_weights(model).items():
        chosen = weight.abs().flatten().topk(num_trainable(weight.numel(), rho), largest=False, sorted=False).indices
        masks[name] = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        masks[name][chosen] = True
        masks[name] = masks[name].view_as(weight)
    return masks


def full_fine_tuning(model: nn.Module, rho: float) -> nn.Module:
    """Every weight of the target layers trains."""
    for weight in target_weights(model).values():
        weight.requires_grad_(True)
    return model


def masked_full_fine_tuning(model: nn.Module, rho: float, masks: dict[str, Tensor] | None = None) -> nn.Module:
    """Full fine-tuning whose gradients are multiplied by a mask (target layer -> bool ``[out, in]``) in a hook."""
    full_fine_tuning(model, rho)
    for name, mask in (masks or smallest_weights(model, rho)).items():
        model.get_parameter(f"{name}.weight").register_hook(partial(torch.mul, mask))
    return model


def shira(model: nn.Module, rho: float) -> nn.Module:
    config = ShiraConfig(r=same_count_rank(model, rho), target_modules=default_targets(model), random_seed=0)
    return get_peft_model(model, config)


def super_tuning(model: nn.Module, rho: float) -> nn.Module:
    return get_peft_model(model, SupertuningConfig(sparsity=1 - rho, target_modules=default_targets(model)))


def lora_same_count(model: nn.Module, rho: float) -> nn.Module:
    return _lora(model, same_count_rank(model, rho))


def lora_64(model: nn.Module, rho: float) -> nn.Module:
    return _lora(model, 64)


def _lora(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=default_targets(model)))


def osf(model: nn.Module, rho: float) -> nn.Module:
    """``effective_rank`` counts the directions that stay frozen, per layer; the rest trains."""
    rank = same_count_rank(model, rho)
    names = default_targets(model)
    frozen: dict[str, int | float] = {
        f"{name}$": min(linear_shape(model.get_submodule(name))) - rank for name in names
    }
    return get_peft_model(model, OSFConfig(target_modules=names, rank_pattern=frozen))


def dowser(model: nn.Module, rho: float) -> nn.Module:
    return get_peft_model(model, DowserConfig(rho=rho, importance="magnitude"))


def dowser_column(model: nn.Module, rho: float) -> nn.Module:
    return get_peft_model(model, DowserConfig(rho=rho, importance="magnitude", granularity="column"))


class Method(NamedTuple):
    """How a method is set up.

    ``adapt`` alters a model (base, rho) and returns what trains; ``trains_base``: it writes to the base weights;
    ``optimise``: whether its step has an optimizer.
    """

    adapt: Callable[[nn.Module, float], nn.Module]
    trains_base: bool = False
    optimise: bool = True


METHODS = {
    "dense floor": Method(full_fine_tuning, trains_base=True, optimise=False),
    "full fine-tuning": Method(full_fine_tuning, trains_base=True),
    "masked full fine-tuning": Method(masked_full_fine_tuning, trains_base=True),
    "PEFT SHiRA": Method(shira),
    "PEFT Super-Tuning": Method(super_tuning),
    "LoRA, same count": Method(lora_same_count),
    "LoRA r=64": Method(lora_64),
    "PEFT OSF": Method(osf),
    "Dowser": Method(dowser),
    "Dowser column": Method(dowser_column),
}
# On a bitsandbytes base; Super-Tuning and OSF (peft 0.21.2) fail there.
ON_4BIT = ("PEFT SHiRA", "LoRA, same count", "LoRA r=64", "Dowser", "Dowser column")


def trainable(method: str, base: nn.Module, rho: float) -> Trainable:
    """``base``, altered, ready for training steps."""
    chosen = METHODS[method]
    return Trainable(chosen.adapt(base, rho), optimise=chosen.optimise)


def sharing_copy(base: nn.Module, *, own_weights: bool = False) -> nn.Module:
    """A copy of a frozen model that shares its tensors, but for the weights of the target layers if asked."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    if own_weights:
        for weight in target_weights(base).values():
            shared.pop(id(weight))
    return copy.deepcopy(base, shared)
