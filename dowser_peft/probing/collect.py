"""The probe itself: batches, output, random signs, and a model that leaves exactly as it came."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dowser_peft.probing.forward import (
    Batch,
    encoder_of,
    generates,
    input_device,
    numbered,
    probed_output,
    ready_inputs,
    split,
    token_masks,
)
from dowser_peft.probing.hooks import (
    NeedsOwnInputsError,
    NeedsSinglePromptsError,
    StatisticsHooks,
    first_non_finite,
    is_expert,
)
from dowser_peft.probing.prompts import NonFiniteLogitsError, Sampling, synthetic_inputs, without_pad_token

AUTHORS_BATCH = 4  # the authors' code averages over batches of four prompts before it takes the product
_CPU_TOKENS_PER_BATCH = 1024  # more brings no speed on a CPU
_OUTPUT = "the output of the model, though of no target module,"
_MEMORY_SHARE = 0.4  # of the free memory that activations of one batch may take

Statistics = dict[str, torch.Tensor]


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
) -> tuple[Statistics, Statistics, dict[str, str]]:
    """Probe ``modules``, whose ``shapes`` are (out, in), with ``batches`` or with prompts of the model's own.

    Returns, in float32 on the CPU, activations ``[N, in]`` per input group and sensitivities ``[N, out]``
    per module, and the input group of each module. The global RNG and the model's mode, flags, hooks and
    generation config are restored, also after an exception.
    """
    with _as_it_came(model, seed), without_pad_token(model, enabled=batches is None):
        if batches is None:
            inputs = _own_inputs(model, modules, num_prompts, prompt_length, sampling, tokenizer)
            size = batch_size or _automatic_batch_size(inputs, shapes)
            work = split(inputs, size)
        else:
            work = numbered(batches)
        share_inputs = True
        while True:
            hooks = StatisticsHooks(
                modules, absolute=estimator == "mean_abs", share_inputs=share_inputs, encoder=encoder_of(model)
            )
            try:
                with hooks, _progress(work, num_probes, progress) as bar:
                    parts = []
                    for batch in work:
                        parts.append(_probe_batch(model, hooks, batch, modules, num_probes, seed, bar))
                        if batches is None or batch is work[-1]:
                            _check_called(modules, hooks)
                break
            except NeedsOwnInputsError:
                share_inputs = False
            except (NeedsSinglePromptsError, torch.OutOfMemoryError) as error:
                if batches is not None or size == 1:
                    raise _cannot_split(error) from error
                size = 1 if isinstance(error, NeedsSinglePromptsError) else size // 2
                work = split(inputs, size)
    groups = {name: hooks.input_groups.get(name, name) for name in modules}
    sizes = [batch.num_prompts for batch in work]
    activations = {
        name: _joined([part[0].get(name) for part in parts], sizes, shapes[name][1])
        for name in dict.fromkeys(groups.values())
    }
    sensitivities = {
        name: _joined([part[1].get(name) for part in parts], sizes, shapes[name][0]) / num_probes for name in modules
    }
    if estimator == "mean_abs":
        activations = {name: _mean_of_batches(value) for name, value in activations.items()}
        sensitivities = {name: _mean_of_batches(value) for name, value in sensitivities.items()}
    else:
        sensitivities = {name: value.sqrt() for name, value in sensitivities.items()}
    return activations, sensitivities, groups


def _probe_batch(
    model: nn.Module,
    hooks: StatisticsHooks,
    batch: Batch,
    modules: dict[str, nn.Module],
    num_probes: int,
    seed: int,
    bar: tqdm,
) -> tuple[Statistics, Statistics]:
    """One forward and ``num_probes`` backward passes."""
    inputs = ready_inputs(model, batch.inputs)
    masks = token_masks(model, inputs)
    hooks.start_batch(batch.num_prompts, masks)
    output, real_tokens = probed_output(model, inputs, masks)
    _check_padding(model, hooks, masks)
    if not hooks.inputs_are_finite() or not bool(torch.isfinite(output).all()):
        raise _not_finite(_where(model, modules, inputs, masks) or _OUTPUT)
    if not output.requires_grad:
        raise ValueError(
            "the model's output does not depend on the target modules through differentiable operations, so their "
            "sensitivity cannot be probed; use importance='magnitude'"
        )
    for index, signs in enumerate(_random_signs(output, real_tokens, num_probes, seed, batch.first_prompt)):
        # `backward`, not `grad`: where the graph starts is not known if the embeddings require gradients
        # (enable_input_require_grads). No parameter does.
        torch.autograd.backward(output, signs.to(output), retain_graph=index + 1 < num_probes)
        bar.update(batch.num_prompts)
    if (name := hooks.non_finite_gradient()) is not None:  # attention can hide what went wrong before it
        raise _not_finite(_where(model, modules, inputs, masks) or f"the output gradient of module {name!r}")
    return hooks.take_batch()


def _where(model: nn.Module, modules: dict[str, nn.Module], inputs: Any, masks: dict[str, torch.Tensor]) -> str | None:
    """Where the first NaN or inf comes up in a forward pass."""
    with first_non_finite(modules) as found, torch.no_grad():
        probed_output(model, inputs, masks)
    return found[0] if found else None


def _random_signs(
    output: torch.Tensor, real_tokens: torch.Tensor | None, num_probes: int, seed: int, first_prompt: int
) -> Iterator[torch.Tensor]:
    """Rademacher vectors in the shape of ``output``, int8 on the CPU; zero at padding.

    Each prompt draws from a generator of its own, over its real tokens only, so that neither the batch size
    nor the padding changes what it draws.
    """
    prompts = range(first_prompt, first_prompt + output.shape[0])
    generators = [torch.Generator().manual_seed(((seed << 32) + prompt) % (1 << 64)) for prompt in prompts]
    masks = None if real_tokens is None else real_tokens.cpu()
    for _ in range(num_probes):
        signs = torch.zeros(output.shape, dtype=torch.int8)
        for row, generator in enumerate(generators):
            real = slice(None) if masks is None else masks[row]
            draw = torch.randint(0, 2, signs[row, real].shape, generator=generator, dtype=torch.int8)
            signs[row, real] = draw * 2 - 1
        yield signs


def _joined(parts: list[torch.Tensor | None], sizes: list[int], features: int) -> torch.Tensor:
    """Statistics of all prompts ``[N, features]``; zero for a batch in which the module was not called."""
    return torch.cat(
        [torch.zeros(size, features) if part is None else part for part, size in zip(parts, sizes, strict=True)]
    )


def _mean_of_batches(statistics: torch.Tensor) -> torch.Tensor:
    """Means of every four prompts, ``[ceil(N / 4), features]``."""
    return torch.stack([rows.mean(0) for rows in statistics.split(AUTHORS_BATCH)])


def _own_inputs(
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

    def make() -> dict[str, torch.Tensor]:
        return synthetic_inputs(
            model, num_prompts=num_prompts, prompt_length=prompt_length, sampling=sampling, tokenizer=tokenizer
        )

    try:
        return make()
    except NonFiniteLogitsError:
        with first_non_finite(modules) as found:
            try:
                make()
            except NonFiniteLogitsError as error:
                raise _not_finite(found[0] if found else _OUTPUT) from error
        raise


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


def _check_called(modules: dict[str, nn.Module], hooks: StatisticsHooks) -> None:
    """Synthetic prompts call the same modules each time; of data, only all batches together tell."""
    missing = [name for name in modules if name not in hooks.input_groups and not is_expert(name)]
    if missing:
        raise ValueError(
            f"the target module {missing[0]!r} was not called in the forward pass, so it cannot be scored. "
            "Leave it out (exclude_modules), probe with data that uses it, probe(model, batches=...), "
            "or use importance='magnitude'"
        )


def _check_padding(model: nn.Module, hooks: StatisticsHooks, masks: dict[str, torch.Tensor]) -> None:
    """Some models lengthen what they are given (image features between the tokens); their mask then fits nothing."""
    mask = masks.get("source")
    if mask is None or "target" in masks or not generates(model) or bool(mask.all()):
        return
    if hooks.prompt_lengths and mask.shape[1] not in hooks.prompt_lengths:
        raise ValueError(
            f"the attention_mask is of {mask.shape[1]} tokens, but the target modules see "
            f"{max(hooks.prompt_lengths)}: padding cannot be told from tokens. Pass batches of one prompt each, "
            "without padding"
        )


def _not_finite(where: str) -> ValueError:
    return ValueError(
        f"{where} holds NaN or inf while probing: check the weights up to there, or load the model in a wider dtype "
        "(bfloat16 or float32 instead of float16)"
    )


def _cannot_split(error: Exception) -> Exception:
    if isinstance(error, NeedsSinglePromptsError):
        return ValueError(
            "a target module mixes the tokens of several prompts (routed experts do), so that they cannot be "
            "told apart: pass batches of one prompt each"
        )
    return torch.OutOfMemoryError(
        f"{error}. A probe keeps the activations of at least one prompt: use shorter prompts (prompt_length or "
        "batches), or load the model in 4 bits or on a larger device"
    )


def _progress(work: list[Batch], num_probes: int, shown: bool) -> tqdm:
    total = sum(batch.num_prompts for batch in work) * num_probes
    return tqdm(total=total, desc="Probing", unit="probe", disable=not shown, leave=False)


@contextmanager
def _as_it_came(model: nn.Module, seed: int) -> Iterator[None]:
    """Probe in eval mode, without parameter gradients and without gradient checkpointing; then undo all."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    checkpointed: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    precision = torch.autocast(input_device(model).type, enabled=False)  # that of the weights, whoever calls
    with torch.random.fork_rng(devices=gpus), torch.inference_mode(False), torch.enable_grad(), precision:
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            for module in checkpointed:
                module.gradient_checkpointing = False
            # Not torch.manual_seed: before CUDA is initialised, it would leave a seed behind for later.
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                torch.cuda.default_generators[gpu].manual_seed(seed)
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True
            for parameter in trainable:
                parameter.requires_grad_(True)
            for module, mode in training:
                module.training = mode
