"""What all commands share: consoles, errors, JSON, options, and numbers made readable."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ParamSpec

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from dowser_peft.cli.naming import Place

_DEBUG_KEY = "dowser_peft.debug"
_Options = ParamSpec("_Options")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def _remember_debug(ctx: typer.Context, value: bool) -> bool:
    ctx.meta[_DEBUG_KEY] = value
    return value


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, for other programs.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", envvar="DOWSER_DEBUG", help="Show the traceback of an error.", callback=_remember_debug),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="DTYPE", help="Of the weights: bfloat16, float16, float32, or auto, as they are stored."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model. Only if you trust it."),
]


def results_alone(command: Callable[_Options, None]) -> Callable[_Options, None]:
    """A command that leaves stdout to its results: what libraries print on the way goes to stderr."""

    @functools.wraps(command)
    def run(*args: _Options.args, **options: _Options.kwargs) -> None:
        out.file = sys.stdout
        try:
            with contextlib.redirect_stdout(sys.stderr):
                command(*args, **options)
        finally:
            out.file = None  # type: ignore[assignment]  # rich's default: whatever sys.stdout is

    return run


class CommandGroup(TyperGroup):
    """Runs a subcommand, and turns what it raises into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.simplefilter("ignore", FutureWarning)  # of other packages: not for the user to mend
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except (typer.Exit, typer.Abort, BrokenPipeError):
                raise
            except KeyboardInterrupt:
                _say("interrupted", "bold red", "")
                raise typer.Exit(130) from None
            except Exception as error:
                if ctx.meta.get(_DEBUG_KEY) or not _is_expected(error):
                    raise
                _say("error: ", "bold red", str(error))
                raise typer.Exit(1) from None


def _is_expected(error: Exception) -> bool:
    """Whether the message of an error is meant for the user; anything else is a bug and shows its traceback."""
    from safetensors import SafetensorError

    expected = (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError)
    return isinstance(error, expected) and bool(str(error))


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if not issubclass(category, DeprecationWarning):
        _say("warning: ", "bold yellow", str(message))


def note(message: str) -> None:
    """Tell the user something that is neither a result nor an error."""
    _say("note: ", "bold cyan", message)


def _say(label: str, style: str, message: str) -> None:
    err.print(Text.assemble((label, style), " ".join(message.split())), soft_wrap=True)


def print_json(result: dict[str, Any]) -> None:
    """The only thing that ``--json`` prints to stdout; numbers that JSON does not know become null."""
    print(json.dumps(_finite(result), indent=2, allow_nan=False), file=out.file)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_facts(title: str, facts: dict[str, str]) -> None:
    """A few named facts, one a line."""
    out.print(Text(title, style="bold"), soft_wrap=True)
    width = max(map(len, facts))
    for name, value in facts.items():
        out.print(Text.assemble("  ", (name.ljust(width), "cyan"), "  ", value), soft_wrap=True)


def print_converted(verb: str, result: dict[str, Any], as_json: bool, kind: str = "") -> None:
    """What became of an adapter that was written in another format, ``kind``; without one it is this package's."""
    if as_json:
        print_json(result)
        return
    print_facts(
        f"{verb} {result['adapter']}",
        {
            "base": result["base"],
            "delta": f"{result['trained']:,} weights",
            "saved": f"{result['output']} ({human_bytes(result['file_bytes'])}{kind})",
            "use it": f"{'' if kind else 'import dowser_peft; '}PeftModel.from_pretrained(base, {result['output']!r})",
        },
    )


def print_table(title: str, columns: list[str], rows: Iterable[tuple[Place, list[str]]]) -> None:
    """A table with a row of numbers for each module, grouped by layer; readable in 80 characters."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("module", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    layer = None
    for place, numbers in rows:
        if place.layer != layer and layer is not None:
            table.add_section()
        table.add_row(place.layer if place.layer != layer else "", place.module, *numbers)
        layer = place.layer
    out.print()
    out.print(Text(title, style="bold"))
    out.print(table)


def shows_progress() -> bool:
    """Progress bars are for people: not for logs and pipes."""
    return sys.stderr.isatty()


def human_bytes(size: int) -> str:
    """``size`` in the unit that leaves one to three digits before the point: ``3.2 MB``."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if unit != "B" else f"{size} B"


def short(value: float) -> str:
    """A number in three digits."""
    return f"{value:.3g}"
