"""The training step and inference, against every peer: time and peak memory, and how they grow.

    python -m benchmarks.speed.step                                            # all that fits this machine
    python -m benchmarks.speed.step --part training --shape 33m --tokens 512   # some of it

Parts:

    training    time of a step (forward, backward, AdamW), batch 1; two floors beside the methods: "GEMMs alone", the
                three matrix products of every target layer and nothing else, and "dense floor", the same model with
                dense weight gradients and no optimizer
    memory      peak of what torch holds during a step; with ``ACTIVATION_FREE`` tokens that is the memory without
                activations: base, values, gradients, Adam states, masks, the largest temporary
    inference   forward of the base, with an adapter, and merged

Every cell is one model shape, sequence length, rho and kind of base (see :mod:`benchmarks.speed.common`). float32 on a
CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.speed.common import (
    Results,
    Row,
    add_arguments,
    choose_device,
    interleave,
    peak_memory,
    quantiles,
)
from benchmarks.speed.peers import METHODS, ON_4BIT, Trainable, sharing_copy, target_weights, trainable
from benchmarks.speed.shapes import SHAPES, build_llama

RHO = 0.1
ACTIVATION_FREE = 8  # tokens
GEMMS = "GEMMs alone"
FULL_DEPTH = ("LoRA, same count", "LoRA r=64", "Dowser", "Dowser column")  # what a 7B model leaves room for
SPARSE = ("dense floor", "masked full fine-tuning", "PEFT SHiRA", "PEFT Super-Tuning", "Dowser", "Dowser column")
BYTES_PER_WEIGHT = 60  # of a cell with all methods alive at once, in either precision: base, copies, Adam states


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured in one process; ``layers``: fewer than the shape has; ``nf4``: a 4-bit base."""

    part: str
    shape: str
    tokens: int
    rho: float = RHO
    layers: int | None = None
    nf4: bool = False
    checkpointing: bool = False

    def methods(self) -> list[str]:
        """Names of the methods that are compared."""
        chosen: Collection[str] = METHODS if self.rho == RHO else SPARSE
        if self.checkpointing:
            chosen = FULL_DEPTH
        elif self.nf4:
            chosen = ON_4BIT
        return [name for name in METHODS if name in chosen]

    def build(self, device: torch.device) -> nn.Module:
        """The frozen base."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = build_llama(SHAPES[self.shape], device, dtype, layers=self.layers, nf4=self.nf4)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        return model

    def batch(self, device: torch.device) -> Tensor:
        """Token ids ``[1, tokens]``, the same on every call."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(SHAPES[self.shape].vocabulary, (1, self.tokens), generator=generator).to(device)

    def weights(self) -> int:
        """Weights of the target layers."""
        shape = SHAPES[self.shape]
        return (self.layers or shape.layers) * (4 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate)

    def fits(self, device: torch.device) -> bool:
        """Whether there is memory for it: all methods of a cell are alive at once, those of a memory cell in turn."""
        per_weight = 20 if self.part == "memory" or self.nf4 or self.checkpointing else BYTES_PER_WEIGHT
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            per_weight = 6 if self.checkpointing else per_weight
        else:
            free = psutil.virtual_memory().available
        return per_weight * self.weights() < free


def cells(device: torch.device) -> list[Cell]:
    """The whole suite for a kind of machine, small models first."""
    if device.type == "cuda":
        grown = [("100m", None), ("200m", None), ("1b", None), ("7b", 4)]
        training = [Cell("training", shape, t, layers=n) for shape, n in grown for t in (512, 2048)]
        memory = [Cell("memory", shape, t, layers=n) for shape, n in grown for t in (ACTIVATION_FREE, 2048)]
        rhos = [Cell("training", "1b", 2048, rho) for rho in (0.01, 0.03, 0.3, 0.5)]
        inference = [Cell("inference", shape, 512, layers=n) for shape, n in grown]
        nf4 = [Cell(part, "7b", 2048, layers=4, nf4=True) for part in ("training", "memory")]
        depth = [
            Cell(part, "7b", 2048, nf4=nf4, checkpointing=True)
            for nf4 in (False, True)
            for part in ("memory", "training")
        ]
        return [*training, *memory, *rhos, *inference, *nf4, *depth]
    shapes = ("10m", "33m", "100m")
    training = [Cell("training", shape, tokens) for shape in shapes for tokens in (128, 512)]
    training += [Cell("training", shape, 2048) for shape in shapes[:2]]
    memory = [Cell("memory", shape, tokens) for shape in (*shapes, "200m") for tokens in (ACTIVATION_FREE, 512)]
    rhos = [Cell(part, "33m", 512, rho) for rho in (0.01, 0.03, 0.3, 0.5) for part in ("training", "memory")]
    inference = [Cell("inference", shape, 512) for shape in shapes]
    nf4 = [Cell(part, "33m", 512, nf4=True) for part in ("training", "memory")]
    return [*training, *memory, *rhos, *inference, *nf4]


def training_rows(cell: Cell, device: torch.device, repeats: int, budget_s: float) -> Iterator[Row]:
    """Time of a training step of every method, and of the floors."""
    base, ids = cell.build(device), cell.batch(device)
    models: dict[str, Trainable] = {}
    for name in cell.methods():
        if cell.nf4:  # a 4-bit weight is rearranged in place by whoever reads it
            models[name] = trainable(name, cell.build(device), cell.rho)
        else:
            copied = sharing_copy(base, own_weights=METHODS[name].trains_base)
            models[name] = trainable(name, copied, cell.rho)
    losses: dict[str, list[Tensor]] = {name: [] for name in models}
    actions: dict[str, Callable[[], object]] = {
        name: partial(_step, model, ids, losses[name]) for name, model in models.items()
    }
    if not cell.nf4:
        actions[GEMMS] = gemms(list(target_weights(base).values()), cell.tokens)
    for name, samples in interleave(actions, device, repeats=repeats, budget_s=budget_s).items():
        row: Row = {"method": name, "metric": "step time", "unit": "ms", **quantiles(samples), "samples": samples}
        if name in models:
            row["trained_parameters"] = models[name].trained_parameters
            row["first_loss"], row["last_loss"] = losses[name][0].item(), losses[name][-1].item()
        yield row


def _step(model: Trainable, ids: Tensor, losses: list[Tensor]) -> None:
    losses.append(model.step(ids))


@torch.no_grad()
def gemms(weights: Sequence[Tensor], tokens: int) -> Callable[[], None]:
    """The products of a dense layer's training step for weights ``[out, in]``, and nothing else."""
    inputs = {weight.shape[1]: weight.new_ones(tokens, weight.shape[1]) for weight in weights}
    gradients = {weight.shape[0]: weight.new_ones(tokens, weight.shape[0]) for weight in weights}

    def multiply() -> None:
        for weight in weights:
            x, dy = inputs[weight.shape[1]], gradients[weight.shape[0]]
            x @ weight.T  # y   [tokens, in] @ [in, out]
            dy @ weight  # dx   [tokens, out] @ [out, in]
            dy.T @ x  # dW   [out, tokens] @ [tokens, in]

    return multiply


def memory_rows(cell: Cell, device: torch.device, repeats: int, budget_s: float) -> Iterator[Row]:
    """Peak memory of a training step of every method, one after the other."""
    for name in cell.methods():
        trained: list[int] = []
        peak = peak_memory(partial(_prepare_step, cell, name, device, trained), device)
        yield {
            "method": name,
            "metric": "peak memory",
            "unit": "bytes",
            **quantiles([peak.peak]),
            "between_steps": peak.before,
            "trained_parameters": trained[0],
        }


def _prepare_step(cell: Cell, method: str, device: torch.device, trained: list[int]) -> Callable[[], object]:
    model, ids = trainable(method, cell.build(device), cell.rho), cell.batch(device)
    trained.append(model.trained_parameters)
    model.step(ids)  # allocates the Adam states
    return partial(model.step, ids)


def inference_rows(cell: Cell, device: torch.device, repeats: int, budget_s: float) -> Iterator[Row]:
    """Time of a forward without gradients."""
    base, ids = cell.build(device), cell.batch(device)
    models: dict[str, nn.Module] = {"base": base}
    for name in cell.methods():
        if METHODS[name].trains_base:
            continue
        models[name] = METHODS[name].adapt(sharing_copy(base), cell.rho)
        if name.startswith("Dowser"):
            merged: Any = METHODS[name].adapt(sharing_copy(base, own_weights=True), cell.rho)
            models[f"{name}, merged"] = merged.merge_and_unload()
    actions = {name: partial(_forward, model.eval(), ids) for name, model in models.items()}
    for name, samples in interleave(actions, device, repeats=repeats, budget_s=budget_s).items():
        yield {"method": name, "metric": "forward time", "unit": "ms", **quantiles(samples), "samples": samples}


@torch.no_grad()
def _forward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids)


PARTS: Mapping[str, Callable[[Cell, torch.device, int, float], Iterator[Row]]] = {
    "training": training_rows,
    "memory": memory_rows,
    "inference": inference_rows,
}


def run(chosen: list[Cell], device: torch.device, results: Results, *, repeats: int, budget_s: float) -> None:
    """Measure what is not finished, and write its rows cell by cell."""
    bar = tqdm(chosen, unit="cell")
    for cell in bar:
        configuration = {**dataclasses.asdict(cell), "weights": cell.weights()}
        bar.set_postfix_str(" ".join(f"{key}={value}" for key, value in configuration.items() if value))
        if results.is_finished("step", configuration):
            continue
        if not cell.fits(device):
            tqdm.write(f"does not fit into memory: {configuration}")
            continue
        try:
            results.add("step", configuration, PARTS[cell.part](cell, device, repeats, budget_s))
        except torch.OutOfMemoryError as error:
            tqdm.write(f"out of memory: {configuration}: {error}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "step.jsonl")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", help="only cells of these sequence lengths")
    parser.add_argument("--rho", type=float, nargs="+", help="only cells of these fractions")
    parser.add_argument("--base", choices=("dense", "nf4"), nargs="+", default=["dense", "nf4"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--budget-s", type=float, default=120, help="of one cell's repetitions; three are always done")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    chosen = [
        cell
        for cell in cells(device)
        if cell.part in options.part
        and cell.shape in options.shape
        and (options.tokens is None or cell.tokens in options.tokens)
        and (options.rho is None or cell.rho in options.rho)
        and ("nf4" if cell.nf4 else "dense") in options.base
    ]
    results = Results(options.out, device, fresh=options.fresh)
    run(chosen, device, results, repeats=options.repeats, budget_s=options.budget_s)


if __name__ == "__main__":
    main()
