"""What a probe runs on: the caller's batches, or the model's own prompts, written as far as they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dowser_peft.probing.failures import OUTPUT, not_finite
from dowser_peft.probing.forward import Batch, numbered, split
from dowser_peft.probing.hooks import first_non_finite
from dowser_peft.probing.images import SyntheticImages
from dowser_peft.probing.prompts import GENERATION_BATCH, NonFiniteLogitsError, Sampling, first_token, synthetic_inputs

_CPU_TOKENS_PER_BATCH = 1024  # more brings no speed on a CPU
_MEMORY_SHARE = 0.4  # of the free memory that activations of one batch may take
_GPU_BYTES_PER_BATCH = 10 * 2**30  # at most; GEMMs of a thousand tokens fill any GPU


class DataBatches:
    """The caller's batches, as they are."""

    can_split = False

    def __init__(self, batches: Iterable[Any]) -> None:
        self._work = numbered(batches)
        self.limit = sum(batch.num_prompts for batch in self._work)

    def batches(self, start: int, stop: int) -> list[Batch]:
        """All of them: ``stop`` is always :attr:`limit`."""
        return self._work


class OwnPrompts:
    """Prompts that the model writes for itself, in chunks: how many are written does not change the first ones.

    Args:
        model: a transformers model.
        modules: to name the one where NaN or inf comes up.
        shapes: their (out, in), to estimate the memory of a prompt.
        limit: the most that may be asked for.
        at_once: write all of them before the first is probed.
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
        modules: dict[str, nn.Module],
        shapes: dict[str, tuple[int, int]],
        *,
        limit: int,
        at_once: bool,
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
        self.limit = limit
        self._model, self._modules = model, modules
        self._chunk = limit if at_once else min(limit, GENERATION_BATCH)
        self._options: dict[str, Any] = {"prompt_length": prompt_length, "sampling": sampling, "tokenizer": tokenizer}
        self._images = SyntheticImages(model, seed) if images else None
        self._inputs = self._write(self._chunk)
        self.batch_size = batch_size or _automatic_batch_size(self._inputs, shapes, model.dtype)
        if self._images is not None:
            self._images.check(self.batches(0, 1)[0])

    def batches(self, start: int, stop: int) -> list[Batch]:
        """Prompts ``start`` to ``stop`` in batches."""
        while (written := self._num_written) < stop:
            chunk = self._write(min(self._chunk, self.limit - written))
            self._inputs = {name: torch.cat([value, chunk[name]]) for name, value in self._inputs.items()}
        found = split({name: value[start:stop] for name, value in self._inputs.items()}, self.batch_size, first=start)
        return found if self._images is None else [self._images.drawn(batch) for batch in found]

    @property
    def _num_written(self) -> int:
        return next(iter(self._inputs.values())).shape[0]

    def _write(self, count: int) -> dict[str, torch.Tensor]:
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
