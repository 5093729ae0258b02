"""Weights that DeepSpeed ZeRO-3 has partitioned: an empty tensor in every process, until all of them gather it.

Gathering is a collective: every process must do it, in the same order. DeepSpeed is imported only where there is such
a weight, which only it can have made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 manages the parameter, be it gathered at the moment or not."""
    return hasattr(parameter, "ds_id")


def is_elsewhere(parameter: torch.Tensor | None) -> bool:
    """Whether the parameter has to be gathered before it can be read."""
    return getattr(getattr(parameter, "ds_status", None), "name", "") == "NOT_AVAILABLE"


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of the parameter when it is gathered."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def has_engine(model: nn.Module) -> bool:
    """Whether DeepSpeed's engine gathers the weights of this model, forward and backward."""
    return any(type(module._parameters).__name__ == "ZeROOrderedDict" for module in model.modules())


@contextmanager
def gathered(parameters: Iterable[torch.Tensor | None], *, modified: bool = False) -> Iterator[None]:
    """Parameters as they are while the block runs; those that are elsewhere are gathered, all others left alone.

    Args:
        parameters: None, and what ZeRO-3 does not manage, are skipped.
        modified: the block writes them, the same in every process; what the first process wrote counts.
    """
    managed: list[Any] = [
        p for p in parameters if p is not None and (is_elsewhere(p) or modified and is_partitioned(p))
    ]
    if not managed:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(managed, modifier_rank=0 if modified else None):
        yield


def gather_for(module: nn.Module, parameters: Iterable[torch.Tensor | None]) -> None:
    """Gather what ``module`` reads of other modules, now and whenever it runs, forward and backward.

    DeepSpeed's engine does the same at a first forward pass of its own, but not if the model is called without it.
    """
    for parameter in parameters:
        if parameter is None or not is_elsewhere(parameter):
            continue
        import deepspeed

        found: Any = parameter
        deepspeed.zero.register_external_parameter(module, found)
        found.all_gather()


def is_of_engine(hook: Callable[..., Any]) -> bool:
    """Whether DeepSpeed's engine registered this hook on a module, to gather the weights of it."""
    return (getattr(hook, "__module__", None) or "").startswith("deepspeed.")
