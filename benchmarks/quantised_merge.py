"""What merging costs on a quantised base: into the quantised weights, or into dequantised ones.

An adapter is trained on a 4-bit and on an 8-bit miniature, then turned into a model without an adapter in every way
there is:

    quantised again      merge_and_unload() on the quantised base: W + delta is rounded to the grid of W
    dequantised          base.dequantize(), load the adapter, merge: the grid is gone, W + delta is kept as it is
    original base        the adapter merged into the base that never was quantised

Each is compared with the adapter as it was trained (unmerged on the quantised base): logits of the answers of
held-out questions, what is left of the delta in the weights, and the share of questions answered exactly. Everything
computes in float32 unless a row says bfloat16, so that the rounding of the weights alone is seen.

    python -m benchmarks.quantised_merge                # about five minutes of one core; adds to the rows
    python -m benchmarks.quantised_merge --write        # the table in README.md beside this file, from the rows
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from benchmarks.pages import write_section
from dowser_peft import DowserConfig, ProbeStatistics, probe
from dowser_peft.base_layer import base_weight, differentiable_4bit
from dowser_peft.miniature import CHECKPOINT, UPSTREAM, collate, evaluate, examples, fine_tune
from dowser_peft.tuner_layer import DowserLayer

ROOT = Path(__file__).parents[1]
README = Path(__file__).parent / "README.md"
RESULTS = Path(__file__).parent / "results" / "quantised_merge.jsonl"
SECTION = "quantised merge table"
PACKAGES = ("dowser-peft", "torch", "peft", "transformers", "bitsandbytes")
Row = dict[str, Any]

TASK, STEPS, RHO = "style", 100, 0.1  # those of the demo, as is the first learning rate
LEARNING_RATES = (1e-3, 1e-4)  # the second leaves deltas below the steps of a 4-bit grid
QUANTISATIONS: dict[str, dict[str, Any]] = {
    "4-bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8-bit": {"load_in_8bit": True},
}
UNTRAINED, UNMERGED = "untrained", "unmerged"
FORMS = {
    UNTRAINED: "quantised base before training",
    UNMERGED: "adapter on the quantised base",
    "quantised again": "merged into the quantised base",
    "dequantised, float32": "dequantised, then merged, float32",
    "dequantised, bfloat16": "dequantised, then merged, bfloat16",
    "original base, bfloat16": "merged into the original base, bfloat16",
}


def quantised_base(kind: str) -> nn.Module:
    return LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT,
        quantization_config=BitsAndBytesConfig(**QUANTISATIONS[kind]),
        device_map="cpu",
        dtype=torch.float32,
    ).eval()


def unadapted_forms(kind: str, adapter: Path) -> Iterator[tuple[str, nn.Module]]:
    """The model of each form but the unmerged one, without an adapter."""

    def merged(base: nn.Module) -> nn.Module:
        return PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True).eval()

    yield "quantised again", merged(quantised_base(kind))
    for name in ("float32", "bfloat16"):
        base = quantised_base(kind)
        base.dequantize()
        yield f"dequantised, {name}", merged(base.to(getattr(torch, name)))
    yield "original base, bfloat16", merged(LlavaForConditionalGeneration.from_pretrained(CHECKPOINT))


@torch.no_grad()
def answer_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, items: int) -> torch.Tensor:
    """Logits ``[tokens, vocabulary]`` of every token of the right answers to held-out questions."""
    batch = collate(tokenizer, examples(TASK, "test", items, 0))
    batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
    logits = model(**batch).logits[:, :-1].float()
    return logits[batch["labels"][:, 1:] != -100]


def decoder_weights(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """The weights of the adapted modules as the model computes with them, in float32."""
    found = {}
    for name in names:
        with base_weight(model.get_submodule(name)) as weight:
            found[name] = weight.float().clone()
    return found


def kept_of_delta(
    merged: dict[str, torch.Tensor], base: dict[str, torch.Tensor], delta: dict[str, torch.Tensor]
) -> tuple[float, float]:
    """What a merge did to the trained delta D, with D' = merged - base on the weights that train.

    Returns:
        The part of D that survives, <D', D> / <D, D>, and the rest of D' as noise, ||D' - D|| / ||D||.
    """
    inner = square = error = 0.0
    for name, wanted in delta.items():
        where = wanted != 0
        got, wanted = (merged[name] - base[name])[where].double(), wanted[where].double()
        inner, square = inner + float(got @ wanted), square + float(wanted @ wanted)
        error += float((got - wanted) @ (got - wanted))
    return inner / square, (error / square) ** 0.5


@contextlib.contextmanager
def exact_4bit() -> Iterator[None]:
    """4-bit weights as a GPU dequantises them, on a CPU.

    The CPU kernel of bitsandbytes 0.50 lets each row start with a block of its own, which quantising does not, and
    so mixes up the scales of a width that is no multiple of the block, such as 160. Its inference layout fails there.
    """
    from bitsandbytes.functional import get_4bit_type

    def dequantise(packed, scales, blocksize, quant_type, shape, dtype):
        pairs = packed.reshape(-1).view(torch.uint8)
        codes = torch.stack([pairs >> 4, pairs & 15], 1).view(-1).long()
        scales = scales.float().repeat_interleave(blocksize)[: len(codes)]
        return (get_4bit_type(quant_type, "cpu")[codes] * scales).to(dtype).view(shape)

    with torch.library._scoped_library("bitsandbytes", "IMPL") as library:
        library.impl("dequantize_4bit", dequantise, "CPU", allow_override=True)
        yield


def relative(error: torch.Tensor, reference: torch.Tensor) -> float:
    return float(error.norm() / reference.norm())


def measure(
    kind: str,
    granularity: str,
    lr: float,
    statistics: ProbeStatistics,
    *,
    seed: int,
    steps: int,
    items: int,
    old_items: int,
) -> list[Row]:
    """Train one adapter, and measure every form of it: a row each."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    configuration = {
        "quantisation": kind,
        "granularity": granularity,
        "seed": seed,
        "task": TASK,
        "steps": steps,
        "lr": lr,
        "rho": RHO,
        "items": items,
        "old_items": old_items,
    }
    base = quantised_base(kind)
    with exact_4bit(), contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(differentiable_4bit(base))
        before, at_first = answer_logits(base, tokenizer, items), accuracies(base, tokenizer, items, old_items)
        model = get_peft_model(base, DowserConfig(rho=RHO, granularity=granularity, importance=statistics))
        losses = fine_tune(model, tokenizer, TASK, steps=steps, lr=lr, seed=seed)
        reference = answer_logits(model, tokenizer, items)
        layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, DowserLayer)}
        weights = decoder_weights(model.get_base_model(), list(layers))
        delta = {name: layer.get_delta_weight("default").detach().float() for name, layer in layers.items()}
        model.save_pretrained(folder)
        shared = {"loss": losses[-1], "change": relative(reference - before, reference)}
        rows: list[Row] = [{"form": UNTRAINED, **at_first}]
        rows.append({"form": UNMERGED, **shared, **accuracies(model, tokenizer, items, old_items)})
        for form, unadapted in unadapted_forms(kind, Path(folder)):
            stack.enter_context(differentiable_4bit(unadapted))
            logits = answer_logits(unadapted, tokenizer, items)
            merged = decoder_weights(unadapted, list(layers))
            row = {"form": form, **shared, "logits_error": relative(logits - reference, reference)}
            if not form.startswith("original"):  # whose weights differ from the quantised ones everywhere
                row["delta_kept"], row["delta_error"] = kept_of_delta(merged, weights, delta)
            rows.append(row | accuracies(unadapted, tokenizer, items, old_items))
    return [configuration | row | record() for row in rows]


def accuracies(model: nn.Module, tokenizer: PreTrainedTokenizerBase, items: int, old_items: int) -> Row:
    """Percent of held-out questions answered exactly: of the new task, and on average of the old ones."""
    if model.dtype != torch.float32:  # the same weights, on inputs that need no cast
        model = copy.deepcopy(model).float()
    new = evaluate(model, tokenizer, [TASK], items=items)
    old = evaluate(model, tokenizer, UPSTREAM, items=old_items)
    return {"new_task": new[TASK], "old_tasks": sum(old.values()) / len(old)}


def record() -> Row:
    """Versions, and the last commit of the package; "+changes" if its files differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    commit = git("log", "-1", "--format=%h", "--", "dowser_peft").stdout.strip() or "unknown"
    if git("diff", "--quiet", "HEAD", "--", "dowser_peft").returncode:
        commit += "+changes"
    return {"versions": {name: version(name) for name in PACKAGES}, "commit": commit, "device": "cpu"}


def load_rows(path: Path = RESULTS) -> pd.DataFrame:
    return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])


def table(path: Path = RESULTS) -> str:
    """Markdown: per base, learning rate and form, single weights / whole columns; means over seeds."""
    rows = load_rows(path)
    lines = [
        "| base, learning rate | model | error of logits | error of the delta | new task | old tasks |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (kind, lr), group in rows.groupby(["quantisation", "lr"], sort=False):
        for form, title in FORMS.items():
            both = [group[(group["form"] == form) & (group["granularity"] == name)] for name in ("element", "column")]
            cells = [" / ".join(show(chosen[name]) for chosen in both) for name, show in CELLS.items()]
            cells = ["" if cell == " / " else cell for cell in cells]
            lines.append(f"| {kind}, {lr:g} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(shares: pd.Series) -> str:
    """Of shares: two digits below 10 %."""
    mean = 100 * shares.mean()
    if pd.isna(mean):
        return ""
    return f"{mean:.2g} %" if abs(mean) < 10 else f"{mean:.0f} %"


def score(percents: pd.Series) -> str:
    return f"{percents.mean():.0f}"


CELLS: dict[str, Callable[[pd.Series], str]] = {
    "logits_error": percent,
    "delta_error": percent,
    "new_task": score,
    "old_tasks": score,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, nargs="+", default=LEARNING_RATES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--items", type=int, default=100, help="held-out questions of the new task")
    parser.add_argument("--old-items", type=int, default=10, help="held-out questions of each old task")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="measure nothing; put the table into README.md")
    options = parser.parse_args(arguments)
    if options.write:
        write_section(README, SECTION, table())
        return
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"steps": options.steps, "items": options.items, "old_items": options.old_items}
    for seed, kind in product(range(options.seeds), QUANTISATIONS):
        with exact_4bit():
            statistics = probe(quantised_base(kind), seed=seed, progress=False)
        for lr, granularity in product(options.lr, ("element", "column")):
            rows = measure(kind, granularity, lr, statistics, seed=seed, **settings)
            with options.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            for row in rows:
                print({name: value for name, value in row.items() if name not in ("versions", "commit", "device")})


if __name__ == "__main__":
    main()
