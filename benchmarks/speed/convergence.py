"""How fast the mask settles: distance to a converged probe, over N prompts and R vectors, and what it costs.

    python -m benchmarks.speed.convergence --model miniature
    python -m benchmarks.speed.convergence --model 10m --reference-probes 8

Per N and R: the *mask error* (share of the trained weights, at rho, that the converged mask does not train; the
Hamming distance is twice that, times rho), Spearman's correlation of the scores, the error that the adaptive stop
would have predicted from the same statistics, and the cost: a unit is one forward or one activation-only backward pass
of one prompt. The converged probe writes other prompts (another seed) and draws other vectors. Smaller N are disjoint
parts of the same prompts, so that there are several of each.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.speed.common import Results, Row, add_arguments, choose_device, quantiles
from benchmarks.speed.shapes import SHAPES, build_llama
from dowser_peft import ProbeStatistics, bitmask, bottom_rho_mask, probe
from dowser_peft.miniature import load_miniature
from dowser_peft.model_probe import sampled_weights
from dowser_peft.probing import StoppingRule

NUM_PROMPTS = 256
PROMPTS = (8, 16, 32, 64, 96, 128, 192, 256)
PROBES = (1, 2, 4, 8)
PARTS = 4  # at most, of each N
SPEARMAN_SAMPLES = 20_000  # weights a module


def load(name: str, device: torch.device) -> nn.Module:
    """``miniature``, the pretrained one, or a random Llama of :data:`SHAPES`."""
    if name == "miniature":
        return load_miniature()[0].to(device)
    return build_llama(SHAPES[name], device, torch.float32)


def part_of(statistics: ProbeStatistics, start: int, stop: int) -> ProbeStatistics:
    """The statistics of some of the prompts."""
    return replace(
        statistics,
        activations={name: value[start:stop] for name, value in statistics.activations.items()},
        sensitivities={name: value[start:stop] for name, value in statistics.sensitivities.items()},
    )


def joined(parts: list[ProbeStatistics]) -> ProbeStatistics:
    """The statistics of all prompts of several probes of one model."""
    first = parts[0]
    return replace(
        first,
        activations={name: torch.cat([part.activations[name] for part in parts]) for name in first.activations},
        sensitivities={name: torch.cat([part.sensitivities[name] for part in parts]) for name in first.sensitivities},
    )


def probed_modules(model: nn.Module, statistics: ProbeStatistics) -> dict[str, nn.Module]:
    """The linear layers that were probed, which may sit in a wrapper with a longer name."""
    named = dict(model.named_modules())
    first = statistics.module_names[0]
    prefix = next(name for name in named if name.endswith(first)).removesuffix(first)
    return {name: named[prefix + name] for name in statistics.module_names}


def weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Their weights, ``[out, in]``."""
    return {name: module.weight.detach() for name, module in modules.items()}  # type: ignore[misc]


def masks(weight: dict[str, torch.Tensor], statistics: ProbeStatistics, rho: float) -> dict[str, torch.Tensor]:
    """Packed mask of each module."""
    return {
        name: bottom_rho_mask(value, statistics.activation(name), statistics.sensitivity(name), rho)
        for name, value in weight.items()
    }


def mask_error(found: dict[str, torch.Tensor], converged: dict[str, torch.Tensor]) -> float:
    """The share of the trained weights that ``converged`` does not train; packed masks."""
    lost = sum(bitmask.count(mask & ~converged[name]) for name, mask in found.items())
    return lost / sum(bitmask.count(mask) for mask in found.values())


def spearman(weight: dict[str, torch.Tensor], one: ProbeStatistics, other: ProbeStatistics) -> float:
    """Mean over modules of the rank correlation of the scores, on a sample of the weights."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for name, value in weight.items():
        rows = torch.randint(value.shape[0], (SPEARMAN_SAMPLES,), generator=generator)
        columns = torch.randint(value.shape[1], (SPEARMAN_SAMPLES,), generator=generator)
        scores = []
        for statistics in (one, other):
            product = (statistics.sensitivity(name).float().T @ statistics.activation(name).float())[rows, columns]
            scores.append((product * value[rows, columns].abs().cpu()).numpy())
        total += float(spearmanr(*scores).statistic)
    return total / len(weight)


def predicted_error(rule: StoppingRule, statistics: ProbeStatistics) -> float:
    """What the adaptive stop says of these statistics."""
    names = statistics.module_names
    return rule.mask_error(
        {name: statistics.activation(name).float() for name in names},
        {name: statistics.sensitivity(name).float() for name in names},
    )


def measure(model: nn.Module, reference: ProbeStatistics, rho: float) -> list[Row]:
    """Rows of one model: every N and R."""
    modules = probed_modules(model, reference)
    weight = weights(modules)
    converged = masks(weight, reference, rho)
    rule = StoppingRule(0.05, rho, sampled_weights(modules))
    rows = []
    for num_probes in PROBES:
        started = time.perf_counter()
        all_prompts = probe(model, num_prompts=NUM_PROMPTS, num_probes=num_probes, seed=0, progress=False)
        seconds = (time.perf_counter() - started) / NUM_PROMPTS
        for num_prompts in PROMPTS:
            count = min(PARTS, NUM_PROMPTS // num_prompts)
            parts = [part_of(all_prompts, i * num_prompts, (i + 1) * num_prompts) for i in range(count)]
            row: dict[str, Any] = {
                "method": f"N={num_prompts} R={num_probes}",
                "metric": "mask error",
                "unit": "share of trained weights",
                **quantiles([mask_error(masks(weight, part, rho), converged) for part in parts]),
                "num_prompts": num_prompts,
                "num_probes": num_probes,
                "cost_units": num_prompts * (1 + num_probes),
                "cost_s": num_prompts * seconds,  # prompts written included
                "spearman": spearman(weight, parts[0], reference),
                "predicted": quantiles([predicted_error(rule, part) for part in parts])["median"],
            }
            print(f"{row['method']}: {row['median']:.4f}, predicted {row['predicted']:.4f}", flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser, "convergence.jsonl")
    parser.add_argument("--model", default="miniature", help=f"miniature, or one of {', '.join(SHAPES)}")
    parser.add_argument("--reference-prompts", type=int, default=1024, help="N of the converged probe")
    parser.add_argument("--reference-probes", type=int, default=16, help="R of the converged probe")
    parser.add_argument("--reference", type=Path, nargs="+", help="its files (probing.py --write-reference) instead")
    parser.add_argument("--rho", type=float, default=0.1)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    results = Results(arguments.out, device, fresh=arguments.fresh)
    files = [ProbeStatistics.load(path) for path in arguments.reference or []]
    reference_size = {"num_prompts": arguments.reference_prompts, "num_probes": arguments.reference_probes}
    if files:
        reference_size = {"num_prompts": sum(part.num_prompts for part in files), "num_probes": files[0].num_probes}
    configuration = {"model": arguments.model, "rho": arguments.rho, "reference": reference_size}
    if results.is_finished("convergence", configuration):
        return
    model = load(arguments.model, device)
    reference = joined(files) if files else probe(model, **reference_size, seed=1, progress=False)
    results.add("convergence", configuration, measure(model, reference, arguments.rho))


if __name__ == "__main__":
    main()
