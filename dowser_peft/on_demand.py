"""Weights that are elsewhere, brought where they are read and let go: for passes that no training engine runs.

Two kinds are meant: weights that accelerate offloaded, which its hooks bring for the forward pass of their module, and
weights that DeepSpeed ZeRO-3 partitioned, for which that is done here. Neither helps in a backward pass: what autograd
saves would keep the weights of all layers on the device from forward to the last backward pass. So in place of a
weight, where it comes from is saved, and it is brought again in each backward pass: one layer's weights at a time.

The price is a transfer of the weights for every backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

from dowser_peft.partitioned import gathered, is_partitioned


class _SavedWeight(NamedTuple):
    """A weight, or a view of one, that autograd saved."""

    module: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # of the view in the weight

    def bring(self) -> torch.Tensor:
        with align_module_device(self.module), gathered([self.module.get_parameter(self.name)]):
            whole = self.module.get_parameter(self.name).detach()
            return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


def _as_weight(module: nn.Module, tensor: torch.Tensor) -> _SavedWeight | None:
    """What ``tensor`` is, if it lies in a weight that ``module`` has for the moment."""
    for name, weight in module.named_parameters(recurse=_places_submodules(module)):
        offset = int(tensor.storage_offset() - weight.storage_offset())
        # Partitioned weights are gathered into one storage.
        same_storage = tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() != 0
        if same_storage and 0 <= offset < weight.numel() and tensor.dtype == weight.dtype:
            return _SavedWeight(module, name, tensor.shape, tensor.stride(), offset)
    return None


def _is_brought(module: nn.Module) -> bool:
    """Whether weights of ``module`` are elsewhere until it runs."""
    return has_offloaded_params(module) or any(is_partitioned(p) for p in module.parameters(recurse=False))


def _places_submodules(module: nn.Module) -> bool:
    """Whether accelerate brings the weights of all that is inside ``module`` with it."""
    return getattr(getattr(module, "_hf_hook", None), "place_submodules", False)


@contextmanager
def weights_on_demand(model: nn.Module) -> Iterator[None]:
    """While the block runs, ``model`` holds weights that are elsewhere only while they are read.

    Forward passes may be followed by any number of backward passes, all within the block.
    """
    handles: list[torch.utils.hooks.RemovableHandle] = []
    running: list[tuple[nn.Module, ExitStack]] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack = ExitStack()
        stack.enter_context(gathered(module.parameters(recurse=False)))
        running.append((module, stack))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if running and running[-1][0] is module:
            running.pop()[1].close()

    def pack(tensor: torch.Tensor) -> torch.Tensor | _SavedWeight:
        weight = _as_weight(running[-1][0], tensor) if running else None
        return tensor if weight is None else weight

    def unpack(saved: torch.Tensor | _SavedWeight) -> torch.Tensor:
        return saved.bring() if isinstance(saved, _SavedWeight) else saved

    brought = [module for module in model.modules() if _is_brought(module)]
    if not brought:
        yield
        return
    try:
        for module in brought:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()
