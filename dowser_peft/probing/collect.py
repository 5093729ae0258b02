"""The probe itself: one forward and R backward passes per batch, until there are enough prompts.

Statistics stay on the device that computes them, in float32, until a round has ended; then they, and whether all was
finite, come to the CPU in one transfer. Without a stopping rule there is one round.

Several ranks share each round: each fills the rows of its own prompts and leaves the others zero, and the sum over the
ranks is, bit for bit, what one process would have found. They go on, stop, start again or fail together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dowser_peft.fused_experts import FusedWeight, expert_name
from dowser_peft.probing.failures import cannot_split, check_called, check_padding, first_failure, not_finite
from dowser_peft.probing.forward import (
    Batch,
    encoder_of,
    probed_output,
    prompt_generator,
    ready_inputs,
    token_masks,
)
from dowser_peft.probing.hooks import NeedsOwnInputsError, NeedsSinglePromptsError, StatisticsHooks
from dowser_peft.probing.inputs import DataBatches, OwnPrompts
from dowser_peft.probing.prompts import Sampling, without_pad_token
from dowser_peft.probing.restoring import as_it_came
from dowser_peft.probing.stopping import StoppingRule
from dowser_peft.ranks import Ranks

AUTHORS_BATCH = 4  # the authors' code averages over batches of four prompts before it takes the product

Statistics = dict[str, torch.Tensor]


@dataclass
class Collected:
    """What a probe found, float32 on the CPU.

    Args:
        activations: per input group, ``[N, in]``; of fused experts ``[N, E, in]``.
        sensitivities: per module, ``[N, out]``; of fused experts ``[N, E, out]``.
        input_groups: module -> key of ``activations``.
        mask_error: estimated by the stopping rule; None without one.
    """

    activations: Statistics
    sensitivities: Statistics
    input_groups: dict[str, str]
    mask_error: float | None = None


def collect_statistics(
    model: nn.Module,
    modules: dict[str, Any],
    shapes: dict[str, tuple[int, int]],
    *,
    num_prompts: int,
    num_probes: int,
    prompt_length: int,
    batches: Iterable[Any] | None,
    estimator: str,
    sampling: Sampling,
    batch_size: int | None,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
    progress: bool,
    stopping: StoppingRule | None = None,
    images: bool = False,
    ranks: Ranks | None = None,
) -> Collected:
    """Probe ``modules``, whose ``shapes`` are (out, in), with ``batches`` or with prompts of the model's own.

    A module is a linear layer, or fused experts; then its shape is that of each.

    With ``stopping``, ``num_prompts`` is the most that are probed; with ``images``, each own prompt gets an image. Of
    several ``ranks`` each probes a part, and all return the same, also those without weights (on the meta device). The
    global RNG and the model's mode, flags, hooks and generation config are restored, also after an exception.
    """
    ranks = ranks or Ranks()
    with as_it_came(model, seed), without_pad_token(model, enabled=batches is None):
        source: DataBatches | OwnPrompts
        if batches is None:
            source = OwnPrompts(
                model,
                modules,
                {name: _seen_by_a_token(modules[name], shape) for name, shape in shapes.items()},
                limit=num_prompts,
                at_once=stopping is None,
                ranks=ranks,
                prompt_length=prompt_length,
                sampling=sampling,
                tokenizer=tokenizer,
                batch_size=batch_size,
                images=images,
                seed=seed,
            )
        else:
            source = DataBatches(batches, ranks)
        share_inputs = True
        while True:
            hooks = StatisticsHooks(
                modules, absolute=estimator == "mean_abs", share_inputs=share_inputs, encoder=encoder_of(model)
            )
            run = _Run(model, modules, shapes, hooks, num_probes, seed, ranks)
            try:
                with (
                    hooks,
                    tqdm(
                        total=len(ranks.part(source.limit)) * num_probes,
                        desc="Probing",
                        unit="probe",
                        disable=not (progress and ranks.is_first),
                        leave=False,
                    ) as bar,
                ):
                    return _in_rounds(run, source, stopping, bar)
            except NeedsOwnInputsError:
                share_inputs = False
            except (NeedsSinglePromptsError, torch.OutOfMemoryError) as error:
                if isinstance(source, DataBatches) or source.batch_size == 1:
                    raise cannot_split(error) from error
                source.batch_size = 1 if isinstance(error, NeedsSinglePromptsError) else source.batch_size // 2


def per_expert(statistics: Statistics) -> Statistics:
    """Statistics of fused experts ``[N, E, features]`` as those of E layers ``[N, features]``, in the same memory."""
    found: Statistics = {}
    for name, value in statistics.items():
        if value.ndim == 2:
            found[name] = value
        else:
            found |= {expert_name(name, index): part for index, part in enumerate(value.unbind(1))}
    return found


def _in_rounds(run: _Run, source: DataBatches | OwnPrompts, stopping: StoppingRule | None, bar: tqdm) -> Collected:
    """Probe until the stopping rule is content, or all prompts of ``source`` are used."""
    done, until = 0, source.limit if stopping is None else stopping.first_round(source.limit)
    while True:
        run.probe(source.batches(done, until), bar, done, until, own_prompts=isinstance(source, OwnPrompts))
        found = run.collected()
        if stopping is None:
            return found
        done = until
        if run.ranks.is_first:  # it alone decides: another machine may round otherwise
            found.mask_error = stopping.mask_error(
                per_expert({name: found.activations[group] for name, group in found.input_groups.items()}),
                per_expert(found.sensitivities),
            )
        found.mask_error = run.ranks.share(found.mask_error)
        assert found.mask_error is not None
        if found.mask_error <= stopping.tolerance or done == source.limit:
            return found
        until = stopping.next_round(done, found.mask_error, source.limit)


@dataclass
class _Run:
    """Statistics of the prompts so far."""

    model: nn.Module
    modules: dict[str, Any]
    shapes: dict[str, tuple[int, int]]
    hooks: StatisticsHooks
    num_probes: int
    seed: int
    ranks: Ranks
    activations: list[Statistics] = field(default_factory=list)  # of each round, on the CPU
    sensitivities: list[Statistics] = field(default_factory=list)

    def probe(self, work: list[Batch], bar: tqdm, start: int, stop: int, *, own_prompts: bool) -> None:
        """One round: the prompts ``start`` to ``stop``, of which ``work`` falls to this rank.

        Raises:
            ValueError: if a module was not called, or something is NaN or infinite; it names the module.
            RuntimeError: if another rank failed.
        """
        parts: list[tuple[Statistics, Statistics, torch.Tensor]] = []
        with self.ranks.together(NeedsSinglePromptsError, torch.OutOfMemoryError, NeedsOwnInputsError):
            for batch in work:
                parts.append(self._probe_batch(batch, bar))
                if own_prompts:
                    check_called(self.modules, self.hooks)
        self._agree_on_groups()
        check_called(self.modules, self.hooks)
        with self.ranks.together():
            activations, sensitivities = self._joined(work, parts)
        groups = list(dict.fromkeys(self.hooks.input_groups.get(name, name) for name in self.modules))
        self.activations.append(
            self._of_all_ranks(activations, {name: self._features(name, 1) for name in groups}, work, start, stop)
        )
        self.sensitivities.append(
            self._of_all_ranks(
                sensitivities, {name: self._features(name, 0) for name in self.modules}, work, start, stop
            )
        )

    def _agree_on_groups(self) -> None:
        """Which modules share an input, from all ranks: one alone may not have called every expert."""
        merged: dict[str, str] = {}
        for groups in self.ranks.gather(self.hooks.input_groups):
            for name, group in groups.items():
                if merged.setdefault(name, group) != group:
                    raise NeedsOwnInputsError
        self.hooks.input_groups = merged

    def _joined(
        self, work: list[Batch], parts: list[tuple[Statistics, Statistics, torch.Tensor]]
    ) -> tuple[Statistics, Statistics]:
        """Statistics of all batches of this rank, on the CPU; empty if it has none."""
        if not work:
            return {}, {}
        sizes = [batch.num_prompts for batch in work]
        groups = dict.fromkeys(self.hooks.input_groups.get(name, name) for name in self.modules)
        activations = {
            name: _joined([a.get(name) for a, _, _ in parts], sizes, self._features(name, 1)) for name in groups
        }
        sensitivities = {
            name: _joined([s.get(name) for _, s, _ in parts], sizes, self._features(name, 0)) for name in self.modules
        }
        flags = torch.stack([finite.to(parts[0][2].device) for _, _, finite in parts])
        *factors, flags = _on_cpu([*activations.values(), *sensitivities.values(), flags])
        self._check_finite(work, factors, flags)
        return dict(zip(activations, factors, strict=False)), dict(
            zip(sensitivities, factors[len(activations) :], strict=True)
        )

    def _of_all_ranks(
        self, own: Statistics, features: dict[str, tuple[int, ...]], work: list[Batch], start: int, stop: int
    ) -> Statistics:
        """Statistics of the prompts ``start`` to ``stop``, ``[stop - start, *features]``, on every rank."""
        if self.ranks.size == 1:
            return own
        found = {}
        for name, width in features.items():
            rows = torch.zeros(stop - start, *width)
            if work:
                first = work[0].first_prompt - start
                rows[first : first + own[name].shape[0]] = own[name]
            found[name] = self.ranks.sum(rows)
        return found

    def _features(self, name: str, side: int) -> tuple[int, ...]:
        """Shape of the statistics of one prompt: of outputs, ``side`` 0, or of inputs, 1."""
        features, module = self.shapes[name][side], self.modules[name]
        return (module.num_experts, features) if isinstance(module, FusedWeight) else (features,)

    def _probe_batch(self, batch: Batch, bar: tqdm) -> tuple[Statistics, Statistics, torch.Tensor]:
        """One forward and R backward passes: activations, sensitivities, and whether the output is finite."""
        inputs = ready_inputs(self.model, batch.inputs)
        masks = token_masks(self.model, inputs)
        self.hooks.start_batch(batch.num_prompts, masks)
        output, real_tokens = probed_output(self.model, inputs, masks)
        check_padding(self.model, self.hooks, masks)
        if not output.requires_grad:
            raise ValueError(
                "the model's output does not depend on the target modules through differentiable operations, so their "
                "sensitivity cannot be probed; use importance='magnitude'"
            )
        all_signs = random_signs(output, real_tokens, self.num_probes, self.seed, batch.first_prompt)
        for index, signs in enumerate(all_signs):
            # `backward`, not `grad`: where the graph starts is not known if the embeddings require gradients
            # (enable_input_require_grads). No parameter does.
            on_device = signs.to(output.device, non_blocking=True).to(output.dtype)
            torch.autograd.backward(output, on_device, retain_graph=index + 1 < self.num_probes)
            bar.update(batch.num_prompts)
        return *self.hooks.take_batch(), torch.isfinite(output.detach()).all()

    def _check_finite(self, work: list[Batch], factors: list[torch.Tensor], outputs_are_finite: torch.Tensor) -> None:
        if bool(outputs_are_finite.all()) and all(bool(factor.isfinite().all()) for factor in factors):
            return
        for batch in work:  # attention can hide what went wrong before it: look at the forward pass first
            if (where := first_failure(self.model, self.modules, self.hooks, batch)) is not None:
                raise not_finite(where)
        by_module = zip(reversed(self.modules), reversed(factors), strict=False)
        name = next((name for name, factor in by_module if not bool(factor.isfinite().all())), "")
        raise not_finite(f"the output gradient of module {name!r}")

    def collected(self) -> Collected:
        """Statistics of all rounds, as the estimator has them."""
        groups = {name: self.hooks.input_groups.get(name, name) for name in self.modules}
        activations = {
            name: _together([part[name] for part in self.activations]) for name in dict.fromkeys(groups.values())
        }
        sensitivities = {
            name: _together([part[name] for part in self.sensitivities]) / self.num_probes for name in self.modules
        }
        if self.hooks.absolute:
            activations = {name: _mean_of_batches(value) for name, value in activations.items()}
            sensitivities = {name: _mean_of_batches(value) for name, value in sensitivities.items()}
        else:
            sensitivities = {name: value.sqrt() for name, value in sensitivities.items()}
        return Collected(activations, sensitivities, groups)


def random_signs(
    output: torch.Tensor, real_tokens: torch.Tensor | None, num_probes: int, seed: int, first_prompt: int
) -> Iterator[torch.Tensor]:
    """Rademacher vectors in the shape of ``output``, int8 on the CPU; zero at padding.

    Each prompt draws from a generator of its own, over its real tokens only, so that neither the batch size
    nor the padding changes what it draws.
    """
    generators = [prompt_generator(seed, first_prompt + row) for row in range(output.shape[0])]
    masks = None if real_tokens is None else real_tokens.cpu()
    for _ in range(num_probes):
        signs = torch.zeros(output.shape, dtype=torch.int8, pin_memory=output.is_cuda)
        for row, generator in enumerate(generators):
            real = slice(None) if masks is None else masks[row]
            draw = torch.randint(0, 2, signs[row, real].shape, generator=generator, dtype=torch.int8)
            signs[row, real] = draw * 2 - 1
        yield signs


def _seen_by_a_token(module: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """(out, in) over all experts that a token is sent to."""
    times = module.experts_per_token if isinstance(module, FusedWeight) else 1
    return times * shape[0], times * shape[1]


def _joined(parts: list[torch.Tensor | None], sizes: list[int], features: tuple[int, ...]) -> torch.Tensor:
    """Statistics of the prompts of a round ``[N, *features]``; zero for a batch in which the module was not called."""
    device = next((part.device for part in parts if part is not None), None)
    return torch.cat(
        [
            torch.zeros(size, *features, device=device) if part is None else part.to(device, torch.float32)
            for part, size in zip(parts, sizes, strict=True)
        ]
    )


def _together(rounds: list[torch.Tensor]) -> torch.Tensor:
    """The rows of all rounds, without a copy of a single one: those of fused experts are gigabytes."""
    return rounds[0] if len(rounds) == 1 else torch.cat(rounds)


def _on_cpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies on the CPU, in float32: one transfer per device, not one per tensor."""
    found: dict[int, torch.Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        there = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        if device.type == "cpu":
            found |= {index: tensors[index].float() for index in there}
            continue
        flat = torch.cat([tensors[index].flatten().float() for index in there]).cpu()
        pieces = flat.split([tensors[index].numel() for index in there])
        found |= {index: piece.view(tensors[index].shape) for index, piece in zip(there, pieces, strict=True)}
    return [found[index] for index in range(len(tensors))]


def _mean_of_batches(statistics: torch.Tensor) -> torch.Tensor:
    """Means of every four prompts, ``[ceil(N / 4), ...]``."""
    return torch.stack([rows.mean(0) for rows in statistics.split(AUTHORS_BATCH)])
