"""The ``dowser-peft`` command. One file a subcommand; what they share is in `common` and `models`.

Results go to stdout, everything else (progress, warnings, errors) to stderr. Exit codes: 0 done, 1 something
the user can put right (``error: ...`` says what), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from dowser_peft.cli import demo, export, import_adapter, inspect, merge, probe, train
from dowser_peft.cli.common import CommandGroup, results_alone

app = typer.Typer(
    name="dowser-peft",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(results_alone(probe.probe))
app.command(cls=train.TrainCommand, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})(
    results_alone(train.train)
)
app.command()(results_alone(inspect.inspect))
app.command()(results_alone(merge.merge))
app.command()(results_alone(export.export))
app.command("import")(results_alone(import_adapter.import_adapter))
app.command()(results_alone(demo.demo))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dowser-peft {version('dowser-peft')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Fine-tune large models without forgetting: Model-Dowser (arXiv 2602.04509) for PEFT.

    In Python, one line is enough: get_peft_model(model, DowserConfig(rho=0.1)). This command does the rest without
    code: probe a model once for many runs, train, look into what was chosen, and merge what was trained.
    """


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="dowser-peft")


__all__ = ["app", "main"]
