"""``dowser-peft train``: fine-tune a model on a dataset, without code, and keep what it knew."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from dowser_peft.cli.common import AsJson, Debug, out, print_facts, print_json


class TrainCommand(TyperCommand):
    """A command whose flags are those of TRL's parser: typer passes on what it does not know."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        _print_flags(every=False)


def _print_flags(every: bool) -> None:
    _check_installed()
    from dowser_peft.cli.training.arguments import flag_help

    for title, rows in flag_help(every):
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(style="bold cyan", overflow="fold", max_width=34)
        table.add_column(overflow="fold")
        for flag, default, text in rows:
            table.add_row(flag, Text.assemble(text, (f" [default: {default}]" if default else "", "dim")))
        out.print(Panel(table, title=title, title_align="left", border_style="dim"))
    if not every:
        out.print(" Every flag of TRL's SFTConfig, ScriptArguments and ModelConfig works: see --help-all.\n")


def _print_all(wanted: bool) -> None:
    if wanted:
        _print_flags(every=True)
        raise typer.Exit


def _check_installed() -> None:
    if missing := [name for name in ("datasets", "trl") if find_spec(name) is None]:
        raise ImportError(f'dowser-peft train needs {" and ".join(missing)}: pip install "dowser-peft[train]"')


def train(
    ctx: typer.Context,
    as_json: AsJson = False,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="Show every flag and exit.", callback=_print_all, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a language model, or a vision-language one, on a dataset: TRL's SFT with a Dowser adapter.

    Flags, or the same names in a YAML file (--config run.yaml), which flags overrule. The folder of the run gets the
    adapter, its checkpoints, and a model card. Several GPUs: accelerate launch -m dowser_peft train ...

    Examples:

        dowser-peft train --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name data.jsonl --output_dir run
        dowser-peft train --config run.yaml --rho 0.05 --load_in_4bit
        dowser-peft train --config run.yaml --resume_from_checkpoint true
    """
    _check_installed()
    from dowser_peft.cli.training.arguments import parse
    from dowser_peft.cli.training.run import run

    result = run(parse(list(ctx.args), ctx.fail))
    if result is None:
        return
    if as_json:
        print_json(result)
        return
    _print_result(result)


def _print_result(result: dict[str, Any]) -> None:
    from dowser_peft.cli.training.retention import print_report

    print_facts(
        f"Trained {result['base']}",
        {
            "adapter": f"{result['output']}: {result['trained']:,} weights",
            "steps": f"{result['steps']}, {result['epochs']:.3g} epochs"
            + (f"; went on from {result['resumed_from']}" if result["resumed_from"] else ""),
            "loss": "none: nothing was left to train"
            if result["loss"] is None
            else f"{result['loss']:.4g}, mean of the training",
            "time": f"{result['seconds']:.1f} s",
            "use it": f"import dowser_peft; PeftModel.from_pretrained(base, {result['output']!r})",
        },
    )
    if result["retention"] is not None:
        print_report(result["retention"])
