"""Hooks that turn one forward and R backward passes into per-prompt statistics.

Per module and prompt, over the tokens of the prompt that are not padding:

    activation    mean |h|                       from the module's input, in forward
    sensitivity   sum of g^2 (or mean of |g|)    g = d(xi^T f)/dz, from the gradient of its output z

Gradients flow to activations only: the graph starts at the outputs of the first target modules, and no
weight gradient is ever computed. Nothing of size [out, in] exists, and nothing is copied to the host.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


class NeedsSinglePrompts(Exception):
    """A module mixes the tokens of several prompts, so prompts must be probed one at a time."""


class NeedsOwnInputs(Exception):
    """Modules that shared their input in one pass did not in another: each needs its own statistics."""


class StatisticsHooks:
    """Context manager: hooks on ``modules`` for the length of a ``with`` block, always removed at its end.

    Call :meth:`start_batch` before each forward pass; read :meth:`take_batch` after its backward passes.
    """

    def __init__(self, modules: dict[str, nn.Module], *, absolute: bool, share_inputs: bool) -> None:
        self._modules = modules
        self._absolute = absolute
        self._share_inputs = share_inputs
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.input_groups: dict[str, str] = {}
        self.leaves: list[torch.Tensor] = []

    def __enter__(self) -> StatisticsHooks:
        for name, module in self._modules.items():
            self._handles.append(
                module.register_forward_hook(partial(self._on_forward, name), with_kwargs=True)
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget_batch()

    def start_batch(self, num_prompts: int, token_masks: dict[str, torch.Tensor]) -> None:
        """``token_masks``: bool ``[B, T]`` per kind of token ('encoder', 'decoder'), False at padding."""
        if num_prompts > 1 and any(_EXPERT.search(name) for name in self._modules):
            raise NeedsSinglePrompts
        self._forget_batch()
        self._num_prompts = num_prompts
        self._token_masks = token_masks

    def _forget_batch(self) -> None:
        self.leaves = []
        self._num_prompts = 0
        self._token_masks: dict[str, torch.Tensor] = {}
        self._activation_sum: dict[str, torch.Tensor] = {}  # per input group [B, in]
        self._token_count: dict[str, torch.Tensor] = {}  # per input group [B]
        self._sensitivity_sum: dict[str, torch.Tensor] = {}  # per module [B, out]
        self._out_features: dict[str, int] = {}  # per module, out
        self._calls: dict[str, int] = {}
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}  # inputs alive -> group

    def _on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        self._record_input(name, args[0] if args else next(iter(kwargs.values())))
        if not output.requires_grad:
            # The graph starts here. A clone, because models may modify the output in place.
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()
        output.register_hook(partial(self._on_gradient, name))
        self._out_features[name] = output.shape[-1]
        return output

    def _record_input(self, name: str, h: torch.Tensor) -> None:
        self._calls[name] = self._calls.get(name, 0) + 1
        known = self._seen.get(id(h)) if self._share_inputs else None
        group = known[1] if known is not None and known[0]() is h else name
        if self.input_groups.setdefault(name, group) != group:
            raise NeedsOwnInputs
        if group != name:
            return
        self._seen[id(h)] = (weakref.ref(h), name)
        total, tokens = self._sum_over_tokens(name, h.detach(), _abs_sum)
        _accumulate(self._activation_sum, name, total)
        _accumulate(self._token_count, name, tokens)

    def _on_gradient(self, name: str, gradient: torch.Tensor) -> None:
        total, tokens = self._sum_over_tokens(name, gradient, _abs_sum if self._absolute else _square_sum)
        if self._absolute:  # the authors' code takes the mean over tokens
            total = total / tokens.clamp(min=1)[:, None]
        _accumulate(self._sensitivity_sum, name, total)

    def _sum_over_tokens(
        self, name: str, x: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``reduce`` over the tokens of each prompt: ``[B, features]``, and the tokens counted ``[B]``."""
        x, mask = self._per_prompt(name, x)
        if mask is None:
            return reduce(x), torch.full((x.shape[0],), float(x.shape[1]), device=x.device)
        mask = mask.to(x.device)
        return reduce(x.masked_fill(~mask[:, :, None], 0)), mask.sum(1).float()

    def _per_prompt(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """View ``x`` as ``[B, tokens, features]`` with the padding mask of those tokens, if it has one."""
        num_prompts, features = self._num_prompts, x.shape[-1]
        lengths = {mask.shape[1] for mask in self._token_masks.values()}
        rows = x.numel() // features if features else 0
        if x.ndim >= 3 and x.shape[0] == num_prompts:
            tokens = rows // num_prompts
        elif num_prompts == 1 or (x.ndim == 2 and rows == num_prompts):
            tokens = rows // num_prompts
        elif x.ndim == 2 and any(rows == num_prompts * length for length in lengths):
            tokens = rows // num_prompts
        elif x.ndim == 3 and x.shape[1] == num_prompts:  # [tokens, B, features]
            x, tokens = x.transpose(0, 1), x.shape[0]
        else:
            raise NeedsSinglePrompts
        masks = {kind: mask for kind, mask in self._token_masks.items() if mask.shape[1] == tokens}
        kind = "decoder" if "decoder" in name and "decoder" in masks else next(iter(masks), "")
        mask = masks.get(kind)
        if mask is not None and bool(mask.all()):
            mask = None
        return x.reshape(num_prompts, tokens, features), mask

    def take_batch(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Statistics of this batch: mean ``|h|`` per input group, and sums over probes per module.

        A module that the output does not depend on has sensitivity zero.

        Raises:
            ValueError: if a module was never called, or naming the first module with NaN or inf.
        """
        for name in self._modules:
            if name not in self._calls:
                raise ValueError(
                    f"the target module {name!r} was not called in the forward pass, so it cannot be scored. "
                    "Leave it out (exclude_modules), probe with data that uses it, probe(model, batches=...), "
                    "or use importance='magnitude'"
                )
            if self._calls[self.input_groups[name]] != self._calls[name]:
                raise NeedsOwnInputs
        activations = {
            name: total / self._token_count[name].clamp(min=1)[:, None]
            for name, total in self._activation_sum.items()
        }
        _check_finite(activations, "input")
        _check_finite(self._sensitivity_sum, "output gradient")
        sensitivities = {
            name: self._sensitivity_sum.get(name, torch.zeros(self._num_prompts, out_features))
            for name, out_features in self._out_features.items()
        }
        self._forget_batch()
        return activations, sensitivities

    def check_activations(self) -> None:
        """Raise ValueError naming the first module whose input holds NaN or inf."""
        _check_finite(self._activation_sum, "input")


def _abs_sum(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, ord=1, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


def _square_sum(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).square()


def _accumulate(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value


def _check_finite(sums: dict[str, torch.Tensor], what: str) -> None:
    """The dict is in the order of the pass, so the first bad entry is where it began."""
    if all(bool(torch.isfinite(value).all()) for value in sums.values()):
        return
    name = next(name for name, value in sums.items() if not bool(torch.isfinite(value).all()))
    raise ValueError(
        f"the {what} of module {name!r} holds NaN or inf while probing: check the weights up to there, or load "
        "the model in a wider dtype (bfloat16 or float32 instead of float16)"
    )
