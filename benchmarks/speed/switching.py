"""Switching what one base in memory answers as: adapter after adapter, merged or not, from memory or from a file.

    python -m benchmarks.speed.switching
    python -m benchmarks.speed.switching --shape 33m --device cpu

Every method holds two adapters of the same target layers on a bfloat16 Llama with random weights, and one sample is
one switch to the other adapter. LoRA and SHiRA have as many values as Dowser has at rho = 0.1.

    unmerge, merge       model.unmerge_adapter(); model.merge_adapter([other]): the base answers at its full speed
    load_adapter         the other adapter's file over the values of the present one, in place; not merged
    hotswap_adapter      the same for LoRA, by PEFT's own function
    reload               a merged model read from its folder by transformers: what a switch costs without adapters
    set_adapter          not merged: the next forward pays instead (see the step suite)

Files are in the cache of the operating system. After the last switch everything is unmerged, and a row tells which
share of the base weights has not come back bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.speed.common import Results, Row, add_arguments, choose_device, interleave, quantiles
from benchmarks.speed.peers import METHODS, sharing_copy, target_weights
from benchmarks.speed.shapes import SHAPES, build_llama

RHO = 0.1
MERGED = ("Dowser", "Dowser column", "LoRA, same count", "PEFT SHiRA")
FROM_FILE = ("Dowser", "Dowser column")
HOTSWAP = "LoRA, same count"
ADAPTERS = ("default", "other")


def with_two_adapters(method: str, base: nn.Module) -> Any:
    """A model with the adapters ``default`` and ``other``, which changes weights of its own."""
    model: Any = METHODS[method].adapt(sharing_copy(base, own_weights=True), RHO)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if any(f".{adapter}" in name for adapter in ADAPTERS):  # deltas of about 1e-3, LoRA's as products
            size = 1e-2 if "lora_" in name else 1e-3
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


def merged_switch(model: Any) -> Callable[[], None]:
    """Merges ``default``; each call merges the other adapter in its place."""
    order = cycle(reversed(ADAPTERS))
    model.merge_adapter(["default"])

    def switch() -> None:
        model.unmerge_adapter()
        model.merge_adapter([next(order)])

    return switch


def actions(
    base: nn.Module, device: torch.device, folder: Path
) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """What is timed, and the models whose base has to come back."""
    models = {name: with_two_adapters(name, base) for name in MERGED}
    found: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        paths = cycle((folder / name / "other", folder / name))
        if name in FROM_FILE:
            reader = with_two_adapters(name, base)
            found[f"{name}: load_adapter"] = partial(_load, reader, paths, device)
        elif name == HOTSWAP:
            reader = with_two_adapters(name, base)
            found[f"{name}: hotswap_adapter"] = partial(_hotswap, reader, paths, device)
        if name == "Dowser":
            unmerged = with_two_adapters(name, base)
            order = cycle(reversed(ADAPTERS))
            found[f"{name}: set_adapter"] = partial(_set, unmerged, order)
    for name, model in models.items():
        found[f"{name}: unmerge, merge"] = merged_switch(model)
    sharing_copy(base, own_weights=True).save_pretrained(folder / "merged")
    found["merged model: reload"] = partial(_reload, folder / "merged", device)
    return found, models


def _load(model: Any, paths: Iterator[Path], device: torch.device) -> None:
    model.load_adapter(str(next(paths)), "default", torch_device=str(device))


def _hotswap(model: Any, paths: Iterator[Path], device: torch.device) -> None:
    hotswap_adapter(model, str(next(paths)), adapter_name="default", torch_device=str(device))


def _set(model: Any, order: Iterator[str]) -> None:
    model.set_adapter(next(order))


def _reload(folder: Path, device: torch.device) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)


def share_changed(model: Any, base: nn.Module) -> float:
    """Share of the target weights that are not bit for bit those of ``base`` after unmerging."""
    model.unmerge_adapter()
    own = target_weights(model.unload())
    changed = sum(int((own[name] != weight).sum()) for name, weight in target_weights(base).items())
    return changed / sum(weight.numel() for weight in own.values())


def rows(base: nn.Module, device: torch.device, repeats: int, budget_s: float) -> Iterator[Row]:
    """One row a way of switching, and one a method for what its switches leave behind."""
    with tempfile.TemporaryDirectory() as folder:
        timed, models = actions(base, device, Path(folder))
        # Two rounds of warm-up: what is derived from a mask on first use, once an adapter.
        samples = interleave(timed, device, repeats=repeats, warmup=2, budget_s=budget_s)
    for name, found in samples.items():
        yield {"method": name, "metric": "switch time", "unit": "ms", **quantiles(found), "samples": found}
    for name, model in models.items():
        share = share_changed(model, base)
        yield {"method": name, "metric": "base weights changed", "unit": "share", **quantiles([share])}


def run(shapes: list[str], device: torch.device, results: Results, *, repeats: int, budget_s: float) -> None:
    """Measure what is not finished."""
    for shape in shapes:
        configuration = {"shape": shape, "rho": RHO, "dtype": "bfloat16"}
        if results.is_finished("switching", configuration):
            continue
        base = build_llama(SHAPES[shape], device, torch.bfloat16)
        results.add("switching", configuration, rows(base, device, repeats, budget_s))
        del base
        gc.collect()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "switching.jsonl")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["33m", "100m"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget-s", type=float, default=120, help="of one cell's repetitions; three are always done")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    results = Results(options.out, device, fresh=options.fresh)
    run(options.shape, device, results, repeats=options.repeats, budget_s=options.budget_s)


if __name__ == "__main__":
    main()
