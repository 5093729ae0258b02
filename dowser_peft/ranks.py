"""The processes of one job, at one piece of work: who takes part, who does what, and that all end alike.

Where torch.distributed is initialised with several processes, every rank makes the same call (a probe, a new adapter).
They meet first, by notes in the store through which the process group itself was set up: no collective operation
starts before it is certain that all are there for the same thing. A rank that waits says whom for, and gives up when
the time of the process group is over. The work itself then runs over a gloo group, whose tensors stay on the CPU, so
that neither the kind of GPU nor the timeout of its collectives matters.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dowser_peft.partitioned import is_partitioned

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_WARNING_S = 30.0  # of waiting for other ranks
_POLL_S = 0.05
# Of one exchange: the others wait while the first rank writes prompts or chooses masks. A rank that has died ends the
# wait at once, because its connection closes.
_WORK_TIMEOUT = timedelta(hours=4)

_this_rank_only: ContextVar[bool] = ContextVar("this_rank_only", default=False)


@contextmanager
def this_rank_only() -> Iterator[None]:
    """Probe, or add an adapter, on this rank alone: other ranks are neither waited for nor given the result.

        if rank == 0:
            with this_rank_only():
                probe(model).save("statistics.safetensors")

    An adapter that is added so, and trained by several ranks, must be added alike by each of them.
    """
    token = _this_rank_only.set(True)
    try:
        yield
    finally:
        _this_rank_only.reset(token)


def several_ranks() -> bool:
    """Whether other processes take part in what this one does."""
    return not _this_rank_only.get() and _is_initialised() and dist.get_world_size() > 1


def _is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def warn_if_apart() -> None:
    """Warn if this is one of several processes that do not know each other yet, each of which will do all the work."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size > 1 and not _this_rank_only.get() and not _is_initialised():
        warnings.warn(
            f"this is one of {size} processes, but torch.distributed is not initialised yet, so each will probe "
            "on its own. Create the TrainingArguments or the Accelerator first, and they share the work",
            stacklevel=3,
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the model has been through ``fully_shard`` (FSDP2)."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def receives_masks() -> bool:
    """Whether the first of several ranks chooses for this one, which then needs no weights."""
    return several_ranks() and dist.get_rank() > 0


class Ranks:
    """A process on its own. See :class:`_SeveralRanks` for the same with others."""

    rank = 0
    size = 1
    workers: Sequence[int] = (0,)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> range:
        """Which of ``count`` things this rank works on: consecutive ones; none without weights."""
        return range(count)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU, summed over all ranks in place."""
        return tensor

    def gather(self, value: T) -> list[T]:
        """The value of every rank."""
        return [value]

    def share(self, value: T) -> T:
        """The value of the first rank."""
        return value

    def share_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the first rank; those of the others need not exist."""
        return tensors

    @contextmanager
    def together(self, *alike: type[Exception]) -> Iterator[None]:
        """A part of the work at whose end all ranks look whether each has succeeded.

        Args:
            alike: exceptions that all ranks raise, the first of these kinds, if one does.

        Raises:
            RuntimeError: if another rank failed; it tells which and why.
        """
        yield


class _SeveralRanks(Ranks):
    def __init__(self, group: dist.ProcessGroup, workers: Sequence[int]) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.workers = workers

    def part(self, count: int) -> range:
        if self.rank not in self.workers:
            return range(0)
        size, longer = divmod(count, len(self.workers))
        index = self.workers.index(self.rank)
        start = index * size + min(index, longer)
        return range(start, start + size + (index < longer))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def share(self, value: T) -> T:
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self._group)
        return found[0]

    def share_tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kinds = self.share({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        shared = {}
        for name, (shape, dtype) in kinds.items():
            tensor = tensors[name].cpu().contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            dist.broadcast(tensor, src=0, group=self._group)
            shared[name] = tensor
        return shared

    @contextmanager
    def together(self, *alike: type[Exception]) -> Iterator[None]:
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        kind = next((index for index, kind in enumerate(alike) if isinstance(error, kind)), None)
        outcomes = self.gather((kind, None if error is None else f"{type(error).__name__}: {error}"))
        failed = [(rank, text) for rank, (kind, text) in enumerate(outcomes) if text is not None and kind is None]
        if failed:
            if error is not None and kind is None:
                raise error
            raise RuntimeError(f"rank {failed[0][0]} failed at this, so no other rank can go on: {failed[0][1]}")
        if kinds := [(kind, text) for kind, text in outcomes if kind is not None]:
            first, text = min(kinds)
            raise error if first == kind and error is not None else alike[first](text)


def meet(what: str, details: Any, *, has_weights: bool = True) -> Ranks:
    """Wait until every rank is here for the same thing.

    Args:
        what: this rank does, for messages: "probe a model".
        details: of it, as JSON can hold them; the same on all ranks.
        has_weights: whether this rank can take a part of the work.

    Raises:
        RuntimeError: if other ranks do not come in time, or come for something else.
    """
    if not several_ranks():
        return Ranks()
    meeting = _meeting_place()
    rank, size = dist.get_rank(), dist.get_world_size()
    digest = hashlib.sha256(json.dumps(details, sort_keys=True, default=str).encode()).hexdigest()
    names = [f"dowser_peft/{meeting.count}/{index}" for index in range(size)]
    meeting.count += 1
    store = dist.distributed_c10d._get_default_store()
    store.set(names[rank], json.dumps([what, digest, has_weights]))
    _wait_for_all(store, names, what)
    notes = [json.loads(note) for note in store.multi_get(names)]
    for index, (other, digest_there, _) in enumerate(notes):
        if (other, digest_there) != (what, digest):
            raise RuntimeError(
                f"the ranks are not at the same thing: rank {rank} is to {what}, rank {index} to {other}"
                f"{', of another model or with other settings' if other == what else ''}. Make the same call on every "
                f"rank; {_ALONE}"
            )
    if meeting.group is None:
        meeting.group = dist.new_group(backend="gloo", timeout=_WORK_TIMEOUT)
    return _SeveralRanks(meeting.group, [index for index, (*_, able) in enumerate(notes) if able] or [0])


def meet_to_run(model: nn.Module, what: str, details: Any, *, has_weights: bool = True) -> Ranks:
    """The ranks that share the work, if each can run the model by itself; arguments as of :func:`meet`.

    Where the weights themselves are spread over the ranks (tensor parallel, DeepSpeed ZeRO-3) a forward pass is work
    of all of them: there each rank does the same as the others, all of it.
    """
    spread = any(is_partitioned(p) or hasattr(p, "placements") for p in model.parameters())
    return Ranks() if spread else meet(what, details, has_weights=has_weights)


_ALONE = "or, if this rank is meant to work alone, use `with dowser_peft.this_rank_only(): ...`"


@dataclass
class _MeetingPlace:
    """Of one process group: how often its ranks have met, and the group over which they work."""

    count: int = 0
    group: dist.ProcessGroup | None = None


_meeting_places: weakref.WeakKeyDictionary[Any, _MeetingPlace] = weakref.WeakKeyDictionary()


def _meeting_place() -> _MeetingPlace:
    return _meeting_places.setdefault(dist.group.WORLD, _MeetingPlace())


def _wait_for_all(store: Any, names: list[str], what: str) -> None:
    limit = 0.9 * store.timeout.total_seconds()  # before ranks that wait elsewhere are ended
    start, patience = time.monotonic(), min(_FIRST_WARNING_S, limit / 4)
    while not store.check(names):
        waited = time.monotonic() - start
        if waited > patience:
            missing = ", ".join(str(rank) for rank, name in enumerate(names) if not store.check([name]))
            message = (
                f"rank {dist.get_rank()} is to {what} together with all ranks, and for {waited:.0f} s has waited for "
                f"rank {missing}. With torch.distributed initialised every rank has to make the same call; {_ALONE}"
            )
            if waited > limit:
                raise RuntimeError(message)
            logger.warning("%s. Giving up after %.0f s", message, limit)
            patience = limit
        time.sleep(_POLL_S)
