"""Adapters of PEFT, Dowser among them, and masks that no configuration offers.

Every mask trains ``round(rho * numel)`` weights of each layer. SHiRA and LoRA count in ranks r, r (in + out) weights
a layer: LoRA keeps the customary r = 8 (7.9 % of the miniature's decoder layers), SHiRA takes the r that comes
closest to rho in total. OSF keeps PEFT's default, half of the singular directions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn

from benchmarks.forgetting.methods.interface import Batch, Data, Settings, Tune, target_modules
from dowser_peft import DowserConfig, ProbeStatistics, bitmask, probe
from dowser_peft.fingerprint import base_fingerprint
from dowser_peft.miniature.training import train
from dowser_peft.scoring import num_trainable

LORA_RANK = 8
PROMPTS, PROMPT_TOKENS, PROMPTS_PER_BATCH = 64, 64, 16

MakeConfig = Callable[[nn.Module, list[str], Data, Settings], PeftConfig]
Masks = dict[str, Tensor]  # module name -> bool [out, in], True where it trains


def adapter(make_config: MakeConfig) -> Tune:
    """A method that wraps the model by ``get_peft_model`` and trains what that leaves trainable."""

    def tune(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
        torch.manual_seed(settings.seed)
        names = target_modules(model, settings.depth)
        return _train(get_peft_model(model, make_config(model, names, data, settings)), data, settings)

    return tune


def _train(tuned: nn.Module, data: Data, settings: Settings) -> nn.Module:
    batches = data.train(settings.batches, settings.seed)
    train(tuned, batches, steps=settings.steps, lr=settings.lr, recipe=settings.recipe)
    return tuned


def _lora(model: nn.Module, names: list[str], data: Data, settings: Settings) -> PeftConfig:
    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names)


def shira_rank(shapes: list[tuple[int, int]], rho: float) -> int:
    """The r for which r (in + out) comes closest to rho in * out, summed over layers; at least 1."""
    return max(1, round(rho * sum(rows * columns for rows, columns in shapes) / sum(map(sum, shapes))))


def _shira(model: nn.Module, names: list[str], data: Data, settings: Settings) -> PeftConfig:
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in names]
    return ShiraConfig(r=shira_rank(shapes, settings.rho), random_seed=settings.seed, target_modules=names)


def _supertuning(select_top: bool) -> MakeConfig:
    def make(model: nn.Module, names: list[str], data: Data, settings: Settings) -> PeftConfig:
        return SupertuningConfig(sparsity=1 - settings.rho, select_top=select_top, target_modules=names)

    return make


def _osf(model: nn.Module, names: list[str], data: Data, settings: Settings) -> PeftConfig:
    return OSFConfig(target_modules=names)


def dowser_config(settings: Settings, names: list[str], **options: object) -> DowserConfig:
    return DowserConfig(rho=settings.rho, seed=settings.seed, target_modules=names, **options)


def _dowser(**options: object) -> MakeConfig:
    return lambda model, names, data, settings: dowser_config(settings, names, **options)


def _all_weights(model: nn.Module, names: list[str], data: Data, settings: Settings) -> PeftConfig:
    return DowserConfig(rho=1.0, importance="magnitude", seed=settings.seed, target_modules=names)


def decayed(tune: Tune, weight_decay: float) -> Tune:
    """A method whose values AdamW draws back to zero, the base model: none can go much beyond 1 / ``weight_decay``."""

    def with_decay(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
        recipe = dataclasses.replace(settings.recipe, weight_decay=weight_decay)
        return tune(model, data, dataclasses.replace(settings, recipe=recipe))

    return with_decay


Statistics = Callable[[nn.Module, list[str], Data, int], ProbeStatistics]  # ..., seed


def own_prompts(model: nn.Module, names: list[str], data: Data, seed: int) -> ProbeStatistics:
    """The paper's probe: prompts that the model writes itself."""
    return probe(model, target_modules=names, seed=seed, progress=False)


def real_questions(model: nn.Module, names: list[str], data: Data, seed: int) -> ProbeStatistics:
    """A probe with as many questions of the old tasks, images included."""
    return probe(model, batches=data.upstream(PROMPTS, seed), target_modules=names, seed=seed, progress=False)


def random_tokens(model: nn.Module, names: list[str], data: Data, seed: int) -> ProbeStatistics:
    """A probe with uniformly random tokens behind BOS."""
    batches = random_token_batches(data, seed)
    return probe(model, batches=batches, target_modules=names, seed=seed, progress=False)


def random_token_batches(data: Data, seed: int) -> list[Batch]:
    """``PROMPTS`` rows of BOS and random tokens, none of them special, ``[PROMPTS_PER_BATCH, PROMPT_TOKENS]`` each."""
    special = set(data.tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(data.tokenizer)) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    tokens = ordinary[torch.randint(len(ordinary), (PROMPTS, PROMPT_TOKENS), generator=generator)]
    if data.tokenizer.bos_token_id is not None:
        tokens[:, 0] = data.tokenizer.bos_token_id
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(PROMPTS_PER_BATCH)]


def without_activations(statistics: ProbeStatistics) -> ProbeStatistics:
    """The score without h: every input counts the same."""
    ones = {name: torch.ones_like(value) for name, value in statistics.activations.items()}
    return dataclasses.replace(statistics, activations=ones)


def _probed(statistics: Statistics) -> MakeConfig:
    def make(model: nn.Module, names: list[str], data: Data, settings: Settings) -> PeftConfig:
        return dowser_config(settings, names, importance=statistics(model, names, data, settings.seed))

    return make


def scores(
    model: nn.Module, statistics: ProbeStatistics, names: list[str], *, weight: bool = True
) -> dict[str, Tensor]:
    """The full importance of each module, float32 ``[out, in]``: |W| times Psi^T A, or without the |W|."""
    found = {}
    for name in names:
        factor = statistics.sensitivity(name).float().T @ statistics.activation(name).float()
        found[name] = factor * model.get_submodule(name).weight.detach().abs().to(factor) if weight else factor
    return found


def lowest(score: Tensor, rho: float) -> Tensor:
    """Mask of the ``round(rho * numel)`` lowest scores of a layer; ties go to the lower flat index."""
    order = score.reshape(-1).sort(stable=True).indices[: num_trainable(score.numel(), rho)]
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view_as(score)


def wrap_with_masks(model: nn.Module, masks: Masks, settings: Settings) -> nn.Module:
    """A Dowser adapter that trains exactly ``masks``; a module whose mask is empty is not adapted.

    DowserConfig has no field for masks that were made elsewhere, but a saved adapter is just that. So one is
    written in memory, with zero values, and loaded by PEFT's own function.
    """
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    modules = {name: model.get_submodule(name) for name in masks}
    shares = {re.escape(name): int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    config = dowser_config(settings, list(masks), base_fingerprint=base_fingerprint(modules), rho_pattern=shares)
    tuned = get_peft_model(model, config)
    state = {}
    for name, mask in masks.items():
        state[f"base_model.model.{name}.dowser_mask"] = bitmask.pack(mask)
        state[f"base_model.model.{name}.dowser_values"] = torch.zeros(int(mask.sum()))
    set_peft_model_state_dict(tuned, state)
    return tuned


def masked(make_masks: Callable[[nn.Module, list[str], Data, Settings], Masks]) -> Tune:
    """A method that trains the masks that ``make_masks`` chooses."""

    def tune(model: nn.Module, data: Data, settings: Settings) -> nn.Module:
        names = target_modules(model, settings.depth)
        return _train(wrap_with_masks(model, make_masks(model, names, data, settings), settings), data, settings)

    return tune


def highest_masks(model: nn.Module, names: list[str], data: Data, settings: Settings) -> Masks:
    """The most important weights instead of the least: it must do worst."""
    found = scores(model, own_prompts(model, names, data, settings.seed), names)
    return {name: lowest(-score, settings.rho) for name, score in found.items()}


def masks_without_weight(model: nn.Module, names: list[str], data: Data, settings: Settings) -> Masks:
    """The lowest ||J|| |h|."""
    found = scores(model, own_prompts(model, names, data, settings.seed), names, weight=False)
    return {name: lowest(score, settings.rho) for name, score in found.items()}


def _statistics_without_h(model: nn.Module, names: list[str], data: Data, seed: int) -> ProbeStatistics:
    return without_activations(own_prompts(model, names, data, seed))


lora = adapter(_lora)
shira = adapter(_shira)
supertuning_largest = adapter(_supertuning(select_top=True))
supertuning_smallest = adapter(_supertuning(select_top=False))
osf = adapter(_osf)
dowser = adapter(_dowser())
all_weights = adapter(_all_weights)  # full fine-tuning, but what trains is the delta
magnitude = adapter(_dowser(importance="magnitude"))
wanda = adapter(_dowser(importance="wanda"))
random = adapter(_dowser(importance="random"))
mean_abs = adapter(_dowser(estimator="mean_abs"))
real_data = adapter(_probed(real_questions))
random_prompts = adapter(_probed(random_tokens))
without_h = adapter(_probed(_statistics_without_h))
highest = masked(highest_masks)
without_weight = masked(masks_without_weight)
dowser_columns = adapter(_dowser(granularity="column", importance="dowser"))
magnitude_columns = adapter(_dowser(granularity="column", importance="magnitude"))
wanda_columns = adapter(_dowser(granularity="column", importance="wanda"))
random_columns = adapter(_dowser(granularity="column", importance="random"))
