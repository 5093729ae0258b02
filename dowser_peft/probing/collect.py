"""The probe itself: batches, output, random signs, and a model that leaves exactly as it came."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dowser_peft.probing.hooks import NeedsOwnInputs, NeedsSinglePrompts, StatisticsHooks
from dowser_peft.probing.prompts import Sampling, input_device, synthetic_inputs

AUTHORS_BATCH = 4  # the authors' code averages over batches of four prompts before it takes the product
_CPU_TOKENS_PER_BATCH = 1024  # more brings no speed on a CPU
_MEMORY_SHARE = 0.4  # of the free memory that activations of one batch may take


@dataclass(frozen=True)
class _Batch:
    inputs: Any  # a mapping of keyword arguments, a tensor, or a sequence of positional arguments
    first_prompt: int
    num_prompts: int


def collect_statistics(
    model: nn.Module,
    modules: dict[str, nn.Module],
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
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, str]]:
    """Probe ``modules``, whose ``shapes`` are (out, in), with ``batches`` or with prompts of the model's own.

    Returns, in float32 on the CPU, activations ``[N, in]`` per input group and sensitivities ``[N, out]``
    per module, and the input group of each module. The global RNG and the model's mode, flags, hooks and
    generation config are restored, also after an exception.
    """
    with _as_it_came(model, seed):
        if batches is None:
            inputs = _synthetic_inputs(model, modules, num_prompts, prompt_length, sampling, tokenizer)
            size = batch_size or _automatic_batch_size(inputs, shapes)
            work = _split(inputs, size)
        else:
            work = _numbered(batches)
        share_inputs = True
        while True:
            try:
                with StatisticsHooks(
                    modules, absolute=estimator == "mean_abs", share_inputs=share_inputs
                ) as hooks:
                    activations, sensitivities = _run(model, hooks, work, num_probes, seed, progress)
                break
            except NeedsOwnInputs:
                share_inputs = False
            except (NeedsSinglePrompts, torch.OutOfMemoryError) as error:
                if batches is not None or size == 1:
                    raise _cannot_split(error) from error
                size = 1 if isinstance(error, NeedsSinglePrompts) else size // 2
                work = _split(inputs, size)
    if estimator == "mean_abs":
        activations = {name: _mean_of_batches(value) for name, value in activations.items()}
        sensitivities = {name: _mean_of_batches(value / num_probes) for name, value in sensitivities.items()}
    else:
        sensitivities = {name: (value / num_probes).sqrt() for name, value in sensitivities.items()}
    return activations, sensitivities, dict(hooks.input_groups)


def _run(
    model: nn.Module, hooks: StatisticsHooks, work: list[_Batch], num_probes: int, seed: int, progress: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    activations: dict[str, list[torch.Tensor]] = {}
    sensitivities: dict[str, list[torch.Tensor]] = {}
    total = sum(batch.num_prompts for batch in work) * num_probes
    with tqdm(total=total, desc="Probing", unit="probe", disable=not progress, leave=False) as bar:
        for batch in work:
            token_masks = _token_masks(batch.inputs)
            hooks.start_batch(batch.num_prompts, token_masks)
            with torch.enable_grad():
                output, token_mask = _probed_output(model, batch.inputs, token_masks)
            if not output.requires_grad:
                raise ValueError(
                    "the model's output does not depend on the target modules through differentiable "
                    "operations, so their sensitivity cannot be probed; use importance='magnitude'"
                )
            signs = _rademacher(output, token_mask, num_probes, seed, batch.first_prompt)
            for index in range(num_probes):
                torch.autograd.grad(
                    output,
                    hooks.leaves,
                    grad_outputs=signs[index].to(output.device, output.dtype),
                    retain_graph=index + 1 < num_probes,
                    allow_unused=True,
                )
                bar.update(batch.num_prompts)
            del output
            for found, into in zip(hooks.take_batch(), (activations, sensitivities), strict=True):
                for name, value in found.items():
                    into.setdefault(name, []).append(value)
    return (
        {name: torch.cat(values).cpu() for name, values in activations.items()},
        {name: torch.cat(values).cpu() for name, values in sensitivities.items()},
    )


def _probed_output(
    model: nn.Module, inputs: Any, token_masks: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """f: the logits of the last token ``[B, V]`` of a model that generates, else the whole output.

    With it, for an output of every token, the mask ``[B, T]`` of the tokens that are not padding.
    """
    generates = isinstance(model, PreTrainedModel) and model.can_generate()
    mask = token_masks.get("decoder", token_masks.get("encoder"))
    last_is_real = mask is None or bool(mask[:, -1].all())
    keep_last = generates and last_is_real and "labels" not in inputs
    result = _forward(model, inputs, keep_last)
    output = _main_tensor(result)
    if output.ndim < 3:
        return output, None
    if not generates:
        return output, mask if mask is not None and mask.shape == output.shape[:2] else None
    if last_is_real or mask is None or mask.shape[1] != output.shape[1]:
        return output[:, -1], None
    last = mask.to(output.device).long().cumsum(1).argmax(1)  # [B], index of the last token that is not padding
    return output[torch.arange(output.shape[0], device=output.device), last], None


def _forward(model: nn.Module, inputs: Any, keep_last: bool) -> Any:
    if not isinstance(inputs, Mapping):
        return model(inputs) if isinstance(inputs, torch.Tensor) else model(*inputs)
    options = {}
    if isinstance(model, PreTrainedModel):
        accepted = inspect.signature(model.forward).parameters
        if "use_cache" in accepted:
            options["use_cache"] = False
        if keep_last and "logits_to_keep" in accepted:
            options["logits_to_keep"] = 1
    return model(**inputs, **options)


def _main_tensor(result: Any) -> torch.Tensor:
    """Logits, or the last hidden state, or the first floating-point tensor of a model's output."""
    if isinstance(result, torch.Tensor):
        return result
    fields = dict(result) if isinstance(result, Mapping) else dict(enumerate(result))
    for name in ("logits", "last_hidden_state"):
        if isinstance(fields.get(name), torch.Tensor):
            return fields[name]
    return next(v for v in fields.values() if isinstance(v, torch.Tensor) and v.is_floating_point())


def _rademacher(
    output: torch.Tensor, token_mask: torch.Tensor | None, num_probes: int, seed: int, first_prompt: int
) -> torch.Tensor:
    """Random signs ``[R, *output.shape]``, int8 on the CPU; zero at padding.

    Each prompt draws from a generator of its own, over its real tokens only, so that neither the batch size
    nor the padding changes what it draws.
    """
    signs = torch.zeros((num_probes, *output.shape), dtype=torch.int8)
    for row in range(output.shape[0]):
        generator = torch.Generator().manual_seed((seed << 32) + first_prompt + row)
        real = slice(None) if token_mask is None else token_mask[row].cpu()
        shape = signs[:, row, real].shape if token_mask is not None else signs[:, row].shape
        signs[:, row, real] = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1
    return signs


def _token_masks(inputs: Any) -> dict[str, torch.Tensor]:
    if not isinstance(inputs, Mapping):
        return {}
    found = {}
    for kind, mask_name, ids_name in (
        ("encoder", "attention_mask", "input_ids"),
        ("decoder", "decoder_attention_mask", "decoder_input_ids"),
    ):
        mask, ids = inputs.get(mask_name), inputs.get(ids_name)
        if mask is not None and mask.ndim == 2:
            found[kind] = mask.bool()
        elif ids is not None:
            found[kind] = torch.ones_like(ids, dtype=torch.bool)
    return found


def _synthetic_inputs(
    model: nn.Module,
    modules: dict[str, nn.Module],
    num_prompts: int,
    prompt_length: int,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, torch.Tensor]:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"there are no synthetic inputs for a {type(model).__name__}, which is not a transformers model. "
            "Probe it with data, probe(model, batches=...), and pass importance=statistics; or use "
            "importance='magnitude' or 'random', which need no forward pass"
        )
    try:
        return synthetic_inputs(
            model,
            num_prompts=num_prompts,
            prompt_length=prompt_length,
            sampling=sampling,
            tokenizer=tokenizer,
        )
    except RuntimeError:
        _blame_module(model, modules)
        raise


def _blame_module(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Sampling fails on NaN logits: raise ValueError naming the module where they began, if that is why."""
    token = torch.zeros((1, 1), dtype=torch.long, device=input_device(model))
    with StatisticsHooks(modules, absolute=True, share_inputs=False) as hooks, torch.no_grad():
        hooks.start_batch(1, {})
        model(token)
        hooks.check_activations()


def _automatic_batch_size(inputs: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]]) -> int:
    main = next(iter(inputs.values()))
    tokens = main.shape[1] if not main.is_floating_point() else 256
    per_prompt = 4 * 2 * tokens * sum(sum(shape) for shape in shapes.values())  # inputs and outputs, twice over
    if main.device.type == "cuda":
        free = torch.cuda.mem_get_info(main.device)[0]
        limit = main.shape[0]
    else:
        free = psutil.virtual_memory().available
        limit = max(1, _CPU_TOKENS_PER_BATCH // tokens)
    return max(1, min(limit, main.shape[0], int(_MEMORY_SHARE * free / per_prompt)))


def _split(inputs: dict[str, torch.Tensor], size: int) -> list[_Batch]:
    total = next(iter(inputs.values())).shape[0]
    return [
        _Batch({name: value[start : start + size] for name, value in inputs.items()}, start, min(size, total - start))
        for start in range(0, total, size)
    ]


def _numbered(batches: Iterable[Any]) -> list[_Batch]:
    work, first = [], 0
    for inputs in batches:
        values = inputs.values() if isinstance(inputs, Mapping) else inputs
        main = inputs if isinstance(inputs, torch.Tensor) else None
        if isinstance(inputs, Mapping) and "input_ids" in inputs:
            main = inputs["input_ids"]
        elif main is None:
            main = next((value for value in values if isinstance(value, torch.Tensor)), None)
        if main is None:
            raise TypeError(f"a batch must be a tensor or hold tensors, got {type(inputs).__name__}")
        work.append(_Batch(inputs, first, main.shape[0]))
        first += main.shape[0]
    if not work:
        raise ValueError("batches is empty: there is nothing to probe with")
    return work


def _cannot_split(error: Exception) -> Exception:
    if isinstance(error, NeedsSinglePrompts):
        return ValueError(
            "a target module mixes the tokens of several prompts (routed experts do), so that they cannot be "
            "told apart: pass batches of one prompt each"
        )
    return error


def _mean_of_batches(statistics: torch.Tensor) -> torch.Tensor:
    """Means of every four prompts, ``[ceil(N / 4), features]``."""
    return torch.stack([rows.mean(0) for rows in statistics.split(AUTHORS_BATCH)])


@contextmanager
def _as_it_came(model: nn.Module, seed: int) -> Iterator[None]:
    """Probe in eval mode, without parameter gradients and without gradient checkpointing; then undo all."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]):
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            for module in checkpointed:
                module.gradient_checkpointing = False  # type: ignore[assignment]
            torch.manual_seed(seed)
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, mode in training:
                module.training = mode
