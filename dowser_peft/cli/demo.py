"""``dowser-peft demo``: teach a small model something new, four ways, and see what each one forgets.

The model is a real LLaVA (vision tower, projector, Llama decoder) of three million parameters that ships with
the package, see :mod:`dowser_peft.miniature`. Everything runs offline on a laptop's CPU in a few minutes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dowser_peft.cli.common import AsJson, Debug, err, human_bytes, out, print_json, shows_progress

if TYPE_CHECKING:
    from torch import nn

TASK = "style"
STEPS = 100
# The best of each method's own sweep, by the H-score on validation questions: benchmarks/forgetting/results
LEARNING_RATES = {"full fine-tuning": 1e-4, "LoRA r=8": 1e-3, "Dowser": 1e-3, "Dowser, weight decay 10": 1.6e-2}
DEPLOYED = "Dowser, weight decay 10"


@dataclass(frozen=True)
class Row:
    """What one method learned and kept, in percent of held-out questions answered exactly."""

    method: str
    new_task: float
    old_tasks: dict[str, float]
    trained_parameters: int
    seconds: float

    @property
    def kept(self) -> float:
        """Average over the old tasks."""
        return sum(self.old_tasks.values()) / len(self.old_tasks)

    @property
    def h_score(self) -> float:
        """Harmonic mean of the new task and the average of the old ones."""
        total = self.new_task + self.kept
        return 2 * self.new_task * self.kept / total if total else 0.0


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the adapter, the merged model and the picture.")
    ] = Path("dowser-demo"),
    rho: Annotated[float, typer.Option(help="Fraction of the decoder's weights that Dowser trains.")] = 0.1,
    steps: Annotated[int, typer.Option(min=1, help="Fine-tuning steps of each method.")] = STEPS,
    items: Annotated[int, typer.Option(min=1, help="Held-out questions per task.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the data, the probe and the initial weights.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a small multimodal model four ways, and measure what it learned and what it forgot.

    A LLaVA of three million parameters, pretrained on handwritten digits, drawn shapes and word games, learns to
    describe images in a new style: with full fine-tuning, with LoRA, with Dowser, and with Dowser under weight decay,
    which draws the model back to what it was; each at the best learning rate of its own sweep. Then the last adapter
    is saved, loaded, merged, and the merged model is checked to answer identically.

    Examples:

        dowser-peft demo

        dowser-peft demo --rho 0.05 --steps 100 -o my-demo
    """
    from dowser_peft import DowserConfig

    DowserConfig(rho=rho)  # a bad value fails before anything is trained
    try:
        import sklearn  # noqa: F401  the handwritten digits
    except ImportError as error:
        raise ImportError('the demo needs scikit-learn: pip install "dowser-peft[demo]"') from error
    _quiet_libraries()
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    rows = [_measure_pretrained(items, seed)]
    adapter = None
    for method in LEARNING_RATES:
        row, model = _run(method, rho, steps, items, seed)
        rows.append(row)
        if method == DEPLOYED:
            adapter = model
    checks = _check_deployment(adapter, output, items, seed)
    picture = _draw(rows, output / "demo.png")
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "task": TASK,
                "rho": rho,
                "steps": steps,
                "items": items,
                "seed": seed,
                "rows": [asdict(row) | {"kept": row.kept, "h_score": row.h_score} for row in rows],
                **checks,
                "seconds": round(seconds, 1),
            }
        )
        return
    _print_rows(rows)
    out.print(
        f"Adapter: {human_bytes(checks['adapter_bytes'])} in {output / 'adapter'}. Loaded again and merged into "
        f"{output / 'merged'}: logits of {items} questions are bit for bit the same."
    )
    if picture is not None:
        out.print(f"Picture: {picture}")
    err.print(f"{seconds:.0f} seconds", style="dim")


def _measure_pretrained(items: int, seed: int) -> Row:
    from dowser_peft.miniature import UPSTREAM, evaluate, load_miniature

    err.print("Before: what the model knows", style="bold")
    model, tokenizer = load_miniature()
    scores = evaluate(model, tokenizer, [*UPSTREAM, TASK], items=items, seed=seed)
    return Row("before", scores.pop(TASK), scores, 0, 0.0)


def _run(method: str, rho: float, steps: int, items: int, seed: int) -> tuple[Row, nn.Module]:
    """Fine-tune the miniature with one method: what came of it, and the tuned model."""
    import torch

    from dowser_peft.miniature import UPSTREAM, evaluate, fine_tune, load_miniature
    from dowser_peft.miniature.methods import METHODS

    err.print(f"{method}: {steps} steps on {TASK!r}", style="bold")
    torch.manual_seed(seed)
    model, tokenizer = load_miniature()
    tuned = METHODS[method].wrap(model, rho, seed)
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    started = time.perf_counter()
    lr, decay = LEARNING_RATES[method], METHODS[method].weight_decay
    fine_tune(tuned, tokenizer, TASK, steps=steps, lr=lr, weight_decay=decay, seed=seed, progress=shows_progress())
    seconds = time.perf_counter() - started
    scores = evaluate(tuned, tokenizer, [*UPSTREAM, TASK], items=items, seed=seed)
    return Row(method, scores.pop(TASK), scores, trained, round(seconds, 1)), tuned


def _check_deployment(model: Any, output: Path, items: int, seed: int) -> dict[str, Any]:
    """Save, load, merge, save, load without this package's classes: the logits must be the same bits.

    Raises:
        RuntimeError: if they are not.
    """
    import torch
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    from dowser_peft.miniature import collate, examples, load_miniature

    err.print("Saving, loading and merging the adapter", style="bold")
    base, tokenizer = load_miniature()
    batch = collate(tokenizer, examples(TASK, "test", items, seed))
    model.save_pretrained(output / "adapter")
    loaded = PeftModel.from_pretrained(base, output / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits
        if not torch.equal(loaded(**batch).logits, expected):
            raise RuntimeError("the loaded adapter answers differently from the trained one")
        merged = loaded.merge_and_unload()
        merged.save_pretrained(output / "merged")
        tokenizer.save_pretrained(output / "merged")
        deployed = LlavaForConditionalGeneration.from_pretrained(output / "merged").eval()
        if not torch.equal(deployed(**batch).logits, expected):
            raise RuntimeError("the merged model answers differently from the adapter")
    return {
        "adapter_bytes": (output / "adapter" / "adapter_model.safetensors").stat().st_size,
        "merged_is_identical": True,
    }


def _print_rows(rows: list[Row]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, title="What was learned, what was kept, in % answered exactly")
    table.title_justify = "left"
    for column in ("", "lr", "new task", "old tasks", "H-score", "trained weights"):
        table.add_column(column, justify="left" if not column else "right")
    best = max(rows[1:], key=lambda row: row.h_score)
    for row in rows:
        change = row.kept - rows[0].kept
        kept = f"{row.kept:.1f}" + (f" ({change:+.1f})" if row is not rows[0] else "")
        numbers = [f"{row.new_task:.1f}", kept, f"{row.h_score:.1f}", f"{row.trained_parameters:,}"]
        numbers = ["", *numbers[:2], "", ""] if row is rows[0] else [f"{LEARNING_RATES[row.method]:g}", *numbers]
        table.add_row(row.method, *numbers, style="bold" if row is best else "")
    out.print()
    out.print(table)
    worst = sorted(rows[0].old_tasks, key=lambda task: min(row.old_tasks[task] for row in rows[1:]))[:5]
    details = Table(box=SIMPLE_HEAD, show_edge=False, title="The old tasks that suffered most")
    details.title_justify = "left"
    details.add_column("")
    for task in worst:
        details.add_column(task, justify="right")
    for row in rows:
        details.add_row(row.method, *(f"{row.old_tasks[task]:.0f}" for task in worst))
    out.print(details)
    out.print(
        "H-score: harmonic mean of the new task and the average of the old ones. One seed: differences of two or "
        "three points are noise; README has three seeds, and the sweep that chose the learning rates.",
        style="dim",
    )
    out.print()


def _draw(rows: list[Row], path: Path) -> Path | None:
    """Two panels: new against old, and every old task under every method. None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    colours = dict(
        zip(["before", *LEARNING_RATES], ["#7b8794", "#d1495b", "#edae49", "#7fc8be", "#1d7268"], strict=True)
    )
    figure = Figure(figsize=(11, 4.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.1])
    for row in rows:
        left.scatter(row.new_task, row.kept, s=90, color=colours[row.method], zorder=3)
        label = row.method.replace(", ", ",\n")
        left.annotate(label, (row.new_task, row.kept), xytext=(0, 9), textcoords="offset points", ha="center")
    left.set_xlabel("new task [%]")
    left.set_ylabel("average of the old tasks [%]")
    left.set_title("Learned and kept (up and right is better)", loc="left", fontsize=10)
    left.set_xlim(-15, 118)
    left.set_ylim(min(row.kept for row in rows) - 8, 110)
    tasks = sorted(rows[0].old_tasks, key=lambda task: rows[1].old_tasks[task])
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        places = [place + (index - (len(rows) - 1) / 2) * width for place in range(len(tasks))]
        heights = [row.old_tasks[task] for task in tasks]
        right.bar(places, heights, width, label=row.method, color=colours[row.method])
    right.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
    right.set_ylabel("answered exactly [%]")
    right.set_ylim(0, 118)
    right.set_title("Old tasks after learning the new one", loc="left", fontsize=10)
    right.legend(ncols=len(rows), loc="upper center", frameon=False, fontsize=8, columnspacing=1, handlelength=1.2)
    for axes in (left, right):
        axes.grid(axis="y", color="#e4e7eb", zorder=0)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _quiet_libraries() -> None:
    """The progress bars of loading a three-megabyte model are noise here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
