"""What a probe runs on: the caller's batches, or the model's own prompts, written as far as they are needed.

Of several ranks each gets a part. A prompt keeps the number that it has in the whole, from which it draws its signs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dowser_peft.probing.failures import OUTPUT, not_finite
from dowser_peft.probing.forward import Batch, input_device, numbered, split
from dowser_peft.probing.hooks import first_non_finite
from dowser_peft.probing.images import SyntheticImages
from dowser_peft.probing.prompts import GENERATION_BATCH, NonFiniteLogitsError, Sampling, first_token, synthetic_inputs
from dowser_peft.ranks import Ranks

_CPU_TOKENS_PER_BATCH = 1024  # more brings no speed on a CPU
_MEMORY_SHARE = 0.4  # of the free memory that activations of one batch may take
_GPU_BYTES_PER_BATCH = 10 * 2**30  # at most; GEMMs of a thousand tokens fill any GPU


class DataBatches:
    """The caller's batches, as they are.

    If every rank has the same ones, each works on a part of them. If they differ (those of a distributed data
    loader), all are probed: those of rank 0 first, then those of rank 1, and so on.
    """

    can_split = False

    def __init__(self, batches: Iterable[Any], ranks: Ranks) -> None:
        with ranks.together():
            own = numbered(batches)
        counts = ranks.gather(sum(batch.num_prompts for batch in own))
        if ranks.size == 1 or len(set(ranks.gather(_digest(own)))) == 1:
            self.limit = counts[0]
            self._work = [own[index] for index in ranks.part(len(own))]
            return
        if idle := sorted(set(range(ranks.size)) - set(ranks.workers)):
            raise ValueError(
                f"rank {idle[0]} has other batches than rank 0, but no weights to probe them with: pass the same "
                "batches on every rank"
            )
        first, self.limit = sum(counts[: ranks.rank]), sum(counts)
        self._work = [Batch(batch.inputs, first + batch.first_prompt, batch.num_prompts) for batch in own]

    def batches(self, start: int, stop: int) -> list[Batch]:
        """All of this rank: ``stop`` is always :attr:`limit`."""
        return self._work


class OwnPrompts:
    """Prompts that the model writes for itself, in chunks: how many are written does not change the first ones.

    Args:
        model: a transformers model.
        modules: to name the one where NaN or inf comes up.
        shapes: their (out, in), to estimate the memory of a prompt.
        limit: the most that may be asked for.
        at_once: write all of them before the first is probed.
        ranks: the first writes for all.
        batch_size: prompts of a batch; default: from free memory.
        images: put an image of noise before each prompt.
        seed: of the images.

    Raises:
        ValueError: if there are no synthetic inputs for this kind of model, or no images.
    """

    can_split = True

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, Any],
        shapes: dict[str, tuple[int, int]],
        *,
        limit: int,
        at_once: bool,
        ranks: Ranks,
        prompt_length: int,
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase | None,
        batch_size: int | None,
        images: bool,
        seed: int,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"there are no synthetic inputs for a {type(model).__name__}, which is not a transformers model. "
                "Probe it with data, probe(model, batches=...), and pass importance=statistics; or use "
                "importance='magnitude' or 'random', which need no forward pass"
            )
        self.limit, self._ranks = limit, ranks
        self._model, self._modules = model, modules
        self._chunk = limit if at_once else min(limit, GENERATION_BATCH)
        self._options: dict[str, Any] = {"prompt_length": prompt_length, "sampling": sampling, "tokenizer": tokenizer}
        with ranks.together():
            has_images = images and ranks.rank in ranks.workers  # it takes weights to know how one is laid out
            self._images = SyntheticImages(model, seed) if has_images else None
        self._inputs = self._write(self._chunk)
        self.batch_size = min(ranks.gather(batch_size or _automatic_batch_size(self._inputs, shapes, model.dtype)))
        with ranks.together():
            if self._images is not None:
                for batch in self.batches(0, 1):
                    self._images.check(batch)

    def batches(self, start: int, stop: int) -> list[Batch]:
        """What falls to this rank of the prompts ``start`` to ``stop``, in batches."""
        while (written := self._num_written) < stop:
            chunk = self._write(min(self._chunk, self.limit - written))
            self._inputs = {name: torch.cat([value, chunk[name]]) for name, value in self._inputs.items()}
        part = self._ranks.part(stop - start)
        first, last = start + part.start, start + part.stop
        found = split({name: value[first:last] for name, value in self._inputs.items()}, self.batch_size, first=first)
        return found if self._images is None else [self._images.drawn(batch) for batch in found]

    @property
    def _num_written(self) -> int:
        return next(iter(self._inputs.values())).shape[0]

    def _write(self, count: int) -> dict[str, torch.Tensor]:
        written: dict[str, torch.Tensor] = {}
        with self._ranks.together():
            if self._ranks.is_first:
                written = self._written(count)
        shared = self._ranks.share_tensors(written)
        return {name: value.to(input_device(self._model)) for name, value in shared.items()}

    def _written(self, count: int) -> dict[str, torch.Tensor]:
        try:
            found = synthetic_inputs(self._model, num_prompts=count, **self._options)
        except NonFiniteLogitsError:
            with first_non_finite(self._modules) as places:
                try:
                    synthetic_inputs(self._model, num_prompts=count, **self._options)
                except NonFiniteLogitsError as error:
                    raise not_finite(places[0] if places else OUTPUT) from error
            raise
        if self._images is None:
            return found
        return self._images.placed(found, first_token(self._model, self._options["tokenizer"]))


def _automatic_batch_size(
    inputs: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]], dtype: torch.dtype
) -> int:
    main = next(iter(inputs.values()))
    tokens = main.shape[1] if not main.is_floating_point() else 256
    features = sum(sum(shape) for shape in shapes.values())
    per_prompt = 2 * dtype.itemsize * tokens * features  # inputs and outputs, twice over
    if main.device.type == "cuda":
        bytes_per_batch = min(_GPU_BYTES_PER_BATCH, _MEMORY_SHARE * torch.cuda.mem_get_info(main.device)[0])
        limit = main.shape[0]
    else:
        bytes_per_batch = _MEMORY_SHARE * psutil.virtual_memory().available
        limit = max(1, _CPU_TOKENS_PER_BATCH // tokens)
    return max(1, min(limit, main.shape[0], int(bytes_per_batch / per_prompt)))


def _digest(work: list[Batch]) -> str:
    """Hash of the tensors of all batches: tells whether two ranks have the same."""
    digest = hashlib.sha256()
    for batch in work:
        inputs: Any = batch.inputs
        if isinstance(inputs, torch.Tensor):
            inputs = [inputs]
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            if isinstance(value, torch.Tensor):
                digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
