"""``dowser-peft export``: a Dowser adapter in a format that PEFT loads without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dowser_peft.cli.common import AsJson, Debug, TrustRemoteCode, print_converted
from dowser_peft.cli.models import (
    ADAPTER_WEIGHTS,
    adapter_config,
    adapter_folder,
    base_source,
    meta_model,
)
from dowser_peft.cli.output_folder import check_output_folder, replacing

FORMATS = ("shira",)


def export(
    adapter: Annotated[str, typer.Argument(help="The adapter: a local folder or a hub id.", metavar="ADAPTER")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write the exported adapter to.")],
    format: Annotated[str, typer.Option(metavar="FORMAT", help="shira: PEFT's SHiRA.")] = "shira",
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The base model, if not where the adapter says. Only its shapes are read."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is already in the folder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in a format that PEFT loads without this package.

    PEFT's SHiRA computes the same outputs bit for bit (of granularity 'column': those of the merged model), from a
    file of 12 bytes per value. It takes torch.nn.Linear layers alone, and one rank for all of them: modules that
    train a smaller share than the others are filled up with zeros.

    Examples:

        dowser-peft export ./adapter -o ./shira
        dowser-peft export ./adapter -o ./shira --format shira --base ./model
    """
    from dowser_peft.exchange import export_shira

    if format not in FORMATS:
        raise ValueError(
            f"--format must be one of {', '.join(FORMATS)}, got {format!r}: no other format of PEFT holds such an "
            "adapter exactly. `dowser-peft merge` writes a model that needs no PEFT at all"
        )
    folder = adapter_folder(adapter)
    source = base_source(adapter_config(folder), base, trust_remote_code, "--base")
    check_output_folder(output, force, [folder, Path(source.name).expanduser()], "adapter")
    model = meta_model(source)
    with replacing(output) as scratch:
        trained = export_shira(folder, scratch, model)
    result = {
        "adapter": adapter,
        "base": source.name,
        "output": str(output),
        "format": format,
        "trained": trained,
        "file_bytes": (output / ADAPTER_WEIGHTS).stat().st_size,
    }
    print_converted("Exported", result, as_json, ", PEFT's SHiRA")
