"""The memory table: what a training step takes, term by term, of Dowser and of its peers.

    python -m benchmarks.speed.accounting --model llava-1.5-7b      # one setting, every method
    python -m benchmarks.speed.accounting --sharding                # bytes per GPU, 7B to 405B
    python -m benchmarks.speed.accounting --rows                    # writes results/accounting.jsonl

``--model`` is a shape (llava-1.5-7b, llama-3-8b, 34b, 70b, 405b) or the path of a transformers config. The rows hold
the settings that README quotes, the sharding table, and the check of the account against measured models. GB are
10^9 bytes. How it is computed: :mod:`benchmarks.speed.account`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode

from benchmarks.speed.account import OPTIMIZERS, TERMS, account, adapt, build_shapes, model_config, static_terms
from benchmarks.speed.accounting_check import ADAPT, RHO, SHAPES, measure
from benchmarks.speed.common import environment
from benchmarks.speed.shape_layers import METHODS, WITHOUT_4BIT, Setting
from benchmarks.speed.storage_tracker import StorageTracker

RESULTS = Path(__file__).parent / "results" / "accounting.jsonl"
MODEL = "llava-1.5-7b"
DEFAULTS = {"rho": 0.1, "base": "bfloat16", "optimizer": "adamw", "tokens": 2048, "batch": 1, "rank": 64}
DEFAULTS |= {"checkpointing": True, "device": "cuda"}
SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, tuple(METHODS)),
    ({"base": "nf4"}, tuple(method for method in METHODS if method not in WITHOUT_4BIT)),
    ({"base": "float32", "device": "cpu"}, ("Dowser", "masked full fine-tuning")),
    ({"checkpointing": False}, ("Dowser", "Dowser column", "LoRA", "SHiRA", "Super-Tuning")),
]
CHECK_TOKENS = 256
GPUS = 8
_SUMS = ("without_activations", "total")


def account_row(model: str, method: str, **changes: Any) -> dict[str, Any]:
    """One row: the setting, every term in bytes, and the sums."""
    setting = {**DEFAULTS, **changes}
    result = account(model_config(model), method, **setting)
    sums = {name: getattr(result, name) for name in _SUMS}
    return {"kind": "account", "model": model, **setting, **dataclasses.asdict(result), **sums}


def check_row(method: str, base: str, checkpointing: bool) -> dict[str, Any]:
    """One row: the account of a small model on the CPU, and the same terms measured."""
    shape = "square" if method == "SHiRA" else "35m"
    config = transformers.LlamaConfig(**SHAPES[shape])
    setting: dict[str, Any] = {"base": base, "tokens": CHECK_TOKENS, "checkpointing": checkpointing}
    expected = account(config, method, rho=RHO, device="cpu", **setting)
    measured = measure(config, method, **setting)
    found = {"kind": "check", "model": shape, "rho": RHO, **setting, "method": method}
    return {**found, "accounted": dataclasses.asdict(expected), "measured": dataclasses.asdict(measured)}


def sharding_row(model: str, rho: float) -> dict[str, Any]:
    """Bytes per GPU without activations: everything on one, or all but the masks sharded (FSDP2, ZeRO-3)."""
    setting = Setting(rho, 0, "cuda", False, torch.bfloat16, StorageTracker())
    with FakeTensorMode():
        shapes = build_shapes(model_config(model), torch.bfloat16)
        adapt(shapes, "Dowser", setting)
        terms = static_terms(shapes)
    trained = 4 * terms["values"]  # values, gradients, two states
    layers = model_config(model).get_text_config().num_hidden_layers
    gathered = (terms["base_weights"] + terms["values"]) // layers  # one layer is gathered at a time
    replicated = terms["masks"] + terms["indices"]
    return {
        "kind": "sharding",
        "model": model,
        "rho": rho,
        "gpus": GPUS,
        "base_weights": terms["base_weights"],
        "trained": trained,
        "masks": terms["masks"],
        "one_gpu": terms["base_weights"] + trained + replicated,
        "per_gpu": (terms["base_weights"] + trained) // GPUS + replicated + gathered,
        "per_gpu_if_masks_were_sharded": (terms["base_weights"] + trained + replicated) // GPUS + gathered,
    }


def write_rows(path: Path = RESULTS) -> None:
    """Compute all rows and write them."""
    found = [account_row(MODEL, method, **changes) for changes, methods in SETTINGS for method in methods]
    found += [sharding_row(model, rho) for model in (MODEL, "34b", "70b", "405b") for rho in (0.05, 0.1)]
    found += [check_row(method, base, kept) for base in ("float32", "bfloat16") for kept in (True, False)
              for method in ADAPT if base == "float32" or "full" not in method]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    made = environment(torch.device("cpu"))
    path.write_text("".join(json.dumps({**row, "made": made}) + "\n" for row in found))


def rows(kind: str, **setting: Any) -> list[dict[str, Any]]:
    """Committed rows of a kind ('account', 'check', 'sharding') whose fields have these values."""
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return [row for row in found if {"kind": kind, **setting}.items() <= row.items()]


def markdown() -> str:
    """README's memory table, from the committed rows: GB of a training step of the 7B shape."""
    columns = {"base": "base_weights", "masks": "masks", "activations": "activations", "total": "total"}
    lines = [
        "| GB | base | trained: values, gradients, states | masks, indices | activations | total | 4-bit base |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    four_bit = {row["method"]: row for row in rows("account", **{**DEFAULTS, "base": "nf4"})}
    for row in rows("account", **DEFAULTS):
        trained = sum(row[term] for term in ("master_weights", "values", "gradients", "optimizer_states"))
        cells = [row[columns["base"]], trained, row["masks"] + row["indices"], row["activations"], row["total"]]
        shown = [f"{cell / 1e9:.1f}" for cell in cells]
        shown.append(f"{four_bit[row['method']]['total'] / 1e9:.1f}" if row["method"] in four_bit else "-")
        name = f"{row['method']} r={row['rank']}" if row["method"] == "LoRA" else row["method"]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def show(found: list[dict[str, Any]], title: str) -> None:
    """Print rows, one a method: GB per term."""
    table = Table(title=title)
    table.add_column("")
    terms = (*TERMS, *_SUMS)
    for row in found:
        table.add_column(row["method"], justify="right")
    for term in terms:
        style = "bold" if term == "total" else ""
        table.add_row(term.replace("_", " "), *(f"{row[term] / 1e9:.3f}" for row in found), style=style)
    Console(width=150).print(table)


def show_sharding(found: list[dict[str, Any]]) -> None:
    """Print the rows of ``sharding_row``: GB."""
    table = Table(title=f"GB without activations; sharded over {GPUS} GPUs with replicated masks")
    columns = ("model", "rho", "base_weights", "trained", "masks", "one_gpu", "per_gpu")
    for name in (*columns, "per_gpu_if_masks_were_sharded"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in found:
        numbers = [f"{row[name] / 1e9:.1f}" for name in (*columns[2:], "per_gpu_if_masks_were_sharded")]
        table.add_row(row["model"], f"{row['rho']:g}", *numbers)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--base", choices=("bfloat16", "float32", "nf4"), default="bfloat16")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-checkpointing", action="store_false", dest="checkpointing")
    for name in ("rho", "tokens", "batch", "rank"):
        parser.add_argument(f"--{name}", type=type(DEFAULTS[name]), default=DEFAULTS[name])
    parser.add_argument("--sharding", action="store_true", help="bytes per GPU of large models instead")
    parser.add_argument("--rows", action="store_true", help="write the committed rows instead")
    options = parser.parse_args()
    if options.rows:
        write_rows()
    elif options.sharding:
        show_sharding([sharding_row(model, rho) for model in (MODEL, "34b", "70b", "405b") for rho in (0.05, 0.1)])
    else:
        setting = {name: getattr(options, name) for name in DEFAULTS}
        methods = [m for m in options.methods if options.base != "nf4" or m not in WITHOUT_4BIT]
        found = [account_row(options.model, method, **setting) for method in methods]
        show(found, f"{options.model}, GB: " + ", ".join(f"{name} {value}" for name, value in setting.items()))


if __name__ == "__main__":
    main()
