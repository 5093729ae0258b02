"""Hooks that turn one forward and R backward passes into per-prompt statistics.

Per module and prompt, over the tokens of the prompt that are not padding:

    activation    mean |h|                       from the module's input, in forward
    sensitivity   sum of g^2 (or mean of |g|)    g = d(xi^T f)/dz, from the gradient of its output z

Gradients flow to activations only: the graph starts at the outputs of the first target modules, and no
weight gradient is ever computed. Nothing of size [out, in] exists, and nothing leaves the device or waits for it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dowser_peft.fused_experts import FusedWeight
from dowser_peft.probing.experts import ExpertStatistics, Layout

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


def is_expert(name: str) -> bool:
    """Whether a module belongs to a routed expert: it is called with some tokens of some prompts."""
    return _EXPERT.search(name) is not None


class NeedsSinglePromptsError(Exception):
    """A module mixes the tokens of several prompts, so prompts must be probed one at a time."""


class NeedsOwnInputsError(Exception):
    """Modules that shared their input in one pass did not in another: each needs its own statistics."""


class StatisticsHooks:
    """Context manager: hooks on ``modules`` for the length of a ``with`` block, always removed at its end.

    Call :meth:`start_batch` before each forward pass; read :meth:`take_batch` after its backward passes.

    Args:
        modules: the linear layers and fused experts to record, by name.
        absolute: record mean ``|g|`` over tokens instead of the sum of ``g^2``.
        share_inputs: modules that read the same tensor share its statistics.
        encoder: of an encoder-decoder model; tells the source tokens from the target tokens.
    """

    def __init__(
        self, modules: dict[str, Any], *, absolute: bool, share_inputs: bool, encoder: nn.Module | None = None
    ) -> None:
        fused = {name: module for name, module in modules.items() if isinstance(module, FusedWeight)}
        self._experts = ExpertStatistics(fused, absolute=absolute, layout_of=self._layout)
        self._modules: dict[str, nn.Module] = {name: modules[name] for name in modules if name not in fused}
        self.absolute = absolute
        self._share_inputs = share_inputs
        self._encoder = encoder
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.input_groups: dict[str, str] = {}

    def __enter__(self) -> StatisticsHooks:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(partial(self._on_forward, name), with_kwargs=True))
        if self._encoder is not None:
            self._handles.append(self._encoder.register_forward_hook(self._on_encoded))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._experts.stop()
        self._forget_batch()

    def start_batch(self, num_prompts: int, token_masks: dict[str, torch.Tensor]) -> None:
        """``token_masks``: bool ``[B, T]``, False at padding, of the 'source' and of a decoder's 'target' tokens."""
        if num_prompts > 1 and any(is_expert(name) for name in self._modules):
            raise NeedsSinglePromptsError
        self._forget_batch(num_prompts, token_masks)
        self._experts.start()

    def _forget_batch(self, num_prompts: int = 0, token_masks: dict[str, torch.Tensor] | None = None) -> None:
        self._num_prompts = num_prompts
        self._token_masks = token_masks or {}
        self._padded = {kind for kind, mask in self._token_masks.items() if not bool(mask.all())}
        self._activation_sum: dict[str, torch.Tensor] = {}  # per input group [B, in]
        self._token_count: dict[str, torch.Tensor] = {}  # per input group [B]
        self._sensitivity_sum: dict[str, torch.Tensor] = {}  # per module [B, out]
        self._out_features: dict[str, int] = {}  # per module, out
        self._calls: dict[str, int] = {}
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}  # inputs: version, group
        self._encoded: weakref.ref[torch.Tensor] | None = None
        self.prompt_lengths: set[int] = set()  # tokens per prompt that the modules saw

    def _on_encoded(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._encoded = weakref.ref(output if isinstance(output, torch.Tensor) else output[0])

    def _on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        if self._num_prompts == 0:  # between batches the model may write its next prompts
            return None
        h = args[0] if args else next(iter(kwargs.values()))
        mask = self._token_mask(h)
        self._record_input(name, h, mask)
        self._out_features[name] = output.shape[-1]
        if not torch.is_grad_enabled():
            return None
        if not output.requires_grad:  # the graph starts here
            output = output.detach().requires_grad_()
        output.register_hook(partial(self._on_gradient, name, mask))
        # Models may modify the output in place: forbidden on a leaf, and on a view it bypasses the tensor hook.
        return output.clone() if output.is_leaf or output._is_view() else output

    def _layout(self, h: torch.Tensor) -> Layout:
        """Prompts and padding of the input of experts."""
        self._per_prompt(h)  # refuses what cannot be told apart
        return Layout(self._num_prompts, self._token_mask(h))

    def _record_input(self, name: str, h: torch.Tensor, mask: torch.Tensor | None) -> None:
        self._calls[name] = self._calls.get(name, 0) + 1
        group = name
        if self._share_inputs and id(h) in self._seen:
            known, version, owner = self._seen[id(h)]
            if known() is h and version == h._version:  # the same tensor, not modified in place since
                group = owner
        if self.input_groups.setdefault(name, group) != group:
            raise NeedsOwnInputsError
        if group != name:
            return
        self._seen[id(h)] = (weakref.ref(h), h._version, name)
        x = self._per_prompt(h.detach())
        _accumulate(self._activation_sum, name, _over_tokens(x, mask, _abs_sum))
        _accumulate(self._token_count, name, self._num_tokens(name, x, mask).to(x.device))

    def _on_gradient(self, name: str, mask: torch.Tensor | None, gradient: torch.Tensor) -> None:
        x = self._per_prompt(gradient)
        total = _over_tokens(x, mask, _abs_sum if self.absolute else _square_sum)
        if self.absolute:  # the authors' code takes the mean over tokens
            total = total / self._num_tokens(name, x, mask).clamp(min=1)[:, None].to(x.device)
        _accumulate(self._sensitivity_sum, name, total)

    def _num_tokens(self, name: str, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Tokens of each prompt ``[B]``, padding left out; for an expert also those that were not sent to it."""
        if is_expert(name) and len(self._token_masks) == 1:
            return next(iter(self._token_masks.values())).sum(1)
        return torch.full((x.shape[0],), x.shape[1], device=x.device) if mask is None else mask.sum(1)

    def _per_prompt(self, x: torch.Tensor) -> torch.Tensor:
        """View ``x`` as ``[B, tokens, features]``."""
        num_prompts, features = self._num_prompts, x.shape[-1]
        rows = x.shape[:-1].numel()
        if x.ndim == 3 and x.shape[0] != num_prompts and x.shape[1] == num_prompts:  # [tokens, B, features]
            return x.transpose(0, 1)
        if x.ndim == 2:  # one row per prompt, or [B * tokens, features]
            lengths = {mask.shape[1] for mask in self._token_masks.values()} | {1}
            separable = rows in {num_prompts * length for length in lengths}
        else:
            separable = x.shape[0] == num_prompts
        if not separable and num_prompts > 1:
            raise NeedsSinglePromptsError
        return x.reshape(num_prompts, rows // num_prompts, features)

    def _token_mask(self, h: torch.Tensor) -> torch.Tensor | None:
        """Which tokens of ``h`` are not padding, ``[B, tokens]``; None if all are."""
        length = h.shape[:-1].numel() // self._num_prompts
        self.prompt_lengths.add(length)
        fitting = [kind for kind, mask in self._token_masks.items() if mask.shape[1] == length]
        # A decoder runs after its encoder, and reads target tokens except where it attends to the source.
        is_target = self._encoded is not None and self._encoded() is not h
        kind = "target" if is_target and "target" in fitting else next(iter(fitting), "")
        return self._token_masks[kind] if kind in self._padded else None

    def take_batch(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Statistics of this batch, where they were computed: mean ``|h|`` per input group ``[B, in]``, sums over
        probes per module ``[B, out]``. Those of fused experts are on the CPU, ``[B, E, in]`` and ``[B, E, out]``.

        A module that was not called is missing; one that the output does not depend on has sensitivity zero.
        """
        for name, calls in self._calls.items():
            if self._calls[self.input_groups[name]] != calls:
                raise NeedsOwnInputsError
        activations = {
            name: total / self._token_count[name].clamp(min=1)[:, None] for name, total in self._activation_sum.items()
        }
        sensitivities = {
            name: self._sensitivity_sum.get(name, torch.zeros(self._num_prompts, out_features))
            for name, out_features in self._out_features.items()
        }
        self._experts.stop()
        self.input_groups |= {name: name for name in self._experts.called}
        of_experts = self._experts.take()
        self._forget_batch()
        return activations | of_experts[0], sensitivities | of_experts[1]


@contextmanager
def first_non_finite(modules: dict[str, Any]) -> Iterator[list[str]]:
    """Watch forward passes of linear layers, and of the modules of fused experts.

    The list receives where NaN or inf came up, the first place first.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        h = args[0] if args else next(iter(kwargs.values()))
        for what, value in (("input", h), ("output", output)):
            if not bool(torch.isfinite(value).all()):
                found.append(f"the {what} of module {name!r}")

    watched = {name: m.experts if isinstance(m, FusedWeight) else m for name, m in modules.items()}
    handles = [m.register_forward_hook(partial(watch, name), with_kwargs=True) for name, m in watched.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _over_tokens(
    x: torch.Tensor, mask: torch.Tensor | None, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``reduce`` ``[B, tokens, features]`` to ``[B, features]``, without the tokens that ``mask`` leaves out."""
    return reduce(x if mask is None else x.masked_fill(~mask.to(x.device)[:, :, None], 0))


def _abs_sum(x: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":  # vector_norm over a middle dimension takes ten times as long there
        return x.abs().sum(1, dtype=dtype)
    return torch.linalg.vector_norm(x, ord=1, dim=1, dtype=dtype)


def _square_sum(x: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":
        return x.to(dtype).square().sum(1)
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype).square()


def _accumulate(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    sums[name] = sums[name].add_(value) if name in sums else value
