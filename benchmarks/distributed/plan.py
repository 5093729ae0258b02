"""What a GPU has to hold when a model is trained on many: computed from shapes, before there is a machine.

    python -m benchmarks.distributed.plan            # print the tables
    python -m benchmarks.distributed.plan --write    # and put them between the markers in README.md beside this file

A decoder is linear in its layers, so a model of one layer and one of two, made of tensors without memory, tell every
term of a large one. How the terms are computed: :mod:`benchmarks.speed.account`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import transformers

from benchmarks.pages import write_section
from benchmarks.speed.account import SHAPES, account

README = Path(__file__).parent / "README.md"
SECTION = "plan"
MODELS = {"7B": "llava-1.5-7b", "34B": "34b", "70B": "70b", "405B": "405b"}  # the decoder of LLaVA-1.5-7B
RHOS = (0.05, 0.1)
GPUS = (8, 16, 64)
NODE = 8
GPU_BYTES = 80e9
METHODS = {"element": "Dowser", "column": "Dowser column"}
BASES = {"bf16": "bfloat16", "4-bit": "nf4"}
TOKENS = 2048
GATHERED_LAYERS = 2  # the layer that computes, and the next one on its way


class Terms(NamedTuple):
    """Bytes of a decoder: what stands still, and what a micro-batch of one sequence takes at its peak."""

    base: int
    values: int
    gradients: int
    states: int
    selection: int  # masks and their offsets, or ids of columns
    step: int  # activations and temporaries of a forward and backward pass
    optimizer_step: int

    @property
    def trained(self) -> int:
        """Values, gradients and optimizer states."""
        return self.values + self.gradients + self.states


class Plan(NamedTuple):
    """Bytes on one GPU."""

    sharded: int
    replicated: int
    gathered: int
    step: int

    @property
    def total(self) -> int:
        return sum(self)


@cache
def terms(model: str, granularity: str, base: str, rho: float, layers: int) -> Terms:
    """Of the shape ``model`` with as many decoder layers."""
    config = transformers.LlamaConfig(**SHAPES[MODELS[model]] | {"num_hidden_layers": layers})
    found = account(config, METHODS[granularity], rho=rho, base=BASES[base], tokens=TOKENS)
    return Terms(
        base=found.base_weights,
        values=found.values,
        gradients=found.gradients,
        states=found.optimizer_states,
        selection=found.masks + found.indices,
        step=found.activations + found.temporary,
        optimizer_step=found.optimizer_temporary,
    )


def per_layer(model: str, granularity: str, base: str, rho: float) -> Terms:
    """What one more decoder layer adds."""
    one, two = (terms(model, granularity, base, rho, layers) for layers in (1, 2))
    return Terms(*(second - first for first, second in zip(one, two, strict=True)))


def whole(model: str, granularity: str, base: str, rho: float) -> Terms:
    """Of the model with all its layers."""
    more = SHAPES[MODELS[model]]["num_hidden_layers"] - 1
    first, layer = terms(model, granularity, base, rho, 1), per_layer(model, granularity, base, rho)
    return Terms(*(term + more * step for term, step in zip(first, layer, strict=True)))


def sharded(model: str, granularity: str, base: str, rho: float, gpus: int) -> Plan:
    """FSDP2 or ZeRO-3 over all GPUs, one sequence on each."""
    all_, layer = whole(model, granularity, base, rho), per_layer(model, granularity, base, rho)
    ends = terms(model, granularity, base, rho, 1).base - layer.base  # embeddings, last norm and head
    return Plan(
        sharded=(all_.base + all_.trained) // gpus,
        replicated=all_.selection,
        gathered=ends + GATHERED_LAYERS * (layer.base + layer.values) + layer.gradients,
        step=max(all_.step, all_.optimizer_step // gpus),
    )


def replicated(model: str, granularity: str, base: str, rho: float) -> Plan:
    """DistributedDataParallel: every GPU holds everything, and a copy of the gradients in buckets."""
    all_ = whole(model, granularity, base, rho)
    held = all_.base + all_.trained + all_.gradients + all_.selection
    return Plan(sharded=0, replicated=held, gathered=0, step=max(all_.step, all_.optimizer_step))


def _shown(total: float) -> str:
    text = f"{total / 1e9:.1f}" if total < 10e9 else f"{total / 1e9:.0f}"
    return text if total <= GPU_BYTES else f"~~{text}~~"


def table(models: Sequence[str] = tuple(MODELS)) -> str:
    """Markdown: GB on each GPU."""
    header = "".join(f" {gpus} GPUs |" for gpus in GPUS)
    lines = [
        f"| model, rho | what is chosen | base | DDP, any number |{header}",
        "| --- | --- | --- | ---: |" + " ---: |" * len(GPUS),
    ]
    for model in models:
        for rho in RHOS:
            for granularity in METHODS:
                for base in BASES:
                    cells = [replicated(model, granularity, base, rho)]
                    cells += [sharded(model, granularity, base, rho, gpus) for gpus in GPUS]
                    shown = " | ".join(_shown(plan.total) for plan in cells)
                    lines.append(f"| {model}, {rho:g} | {granularity} | {base} | {shown} |")
    return "\n".join(lines)


def breakdown(gpus: int = 64, rho: float = 0.1) -> str:
    """Markdown: of what the numbers for a bfloat16 base consist."""
    lines = [
        "| GB | base, whole | trained, whole | sharded: both / GPUs | replicated: masks | gathered | step | sum |",
        "| --- |" + " ---: |" * 7,
    ]
    for model in MODELS:
        all_, plan = whole(model, "element", "bf16", rho), sharded(model, "element", "bf16", rho, gpus)
        cells = (all_.base, all_.trained, *plan, plan.total)
        lines.append(f"| {model} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |")
    return f"Of what a sum consists ({gpus} GPUs, single weights, rho={rho:g}, bfloat16):\n\n" + "\n".join(lines)


def traffic(rho: float = 0.1) -> str:
    """Markdown: what a GPU receives in one step of one micro-batch, of a bfloat16 base and single weights."""
    lines = [
        f"| GB received by a GPU in a step | DDP | sharded over all | sharded in a node of {NODE}, between nodes |",
        "| --- | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        all_ = whole(model, "element", "bf16", rho)
        cells = (2 * all_.gradients, 2 * (all_.base + all_.values) + all_.gradients, 2 * all_.gradients / NODE)
        lines.append(f"| {model} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def report() -> str:
    """All tables."""
    return "\n\n".join((table(), breakdown(), traffic()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md beside this file")
    options = parser.parse_args(arguments)
    text = report()
    print(text)
    if options.write:
        write_section(README, SECTION, text)


if __name__ == "__main__":
    main()
