"""``dowser-peft import``: a SHiRA adapter of PEFT as a Dowser adapter."""

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
    load_model,
    meta_model,
)
from dowser_peft.cli.output_folder import check_output_folder, replacing


def import_adapter(
    adapter: Annotated[str, typer.Argument(help="The SHiRA adapter: a local folder or a hub id.", metavar="ADAPTER")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write the Dowser adapter to.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model, if not where the adapter says.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is already in the folder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a SHiRA adapter of PEFT as a Dowser adapter.

    An adapter that `dowser-peft export` wrote comes back with the same values in the same places. For one that
    PEFT trained the base model is loaded, to remember which weights the adapter belongs to.

    Examples:

        dowser-peft import ./shira -o ./adapter
        dowser-peft import ./shira -o ./adapter --base ./model
    """
    from dowser_peft.exchange import import_shira, tells_its_base

    folder = adapter_folder(adapter)
    source = base_source(adapter_config(folder, "SHIRA"), base, trust_remote_code, "--base")
    check_output_folder(output, force, [folder, Path(source.name).expanduser()], "adapter")
    model = meta_model(source) if tells_its_base(folder) else load_model(source)
    with replacing(output) as scratch:
        trained = import_shira(folder, scratch, model)
    result = {
        "adapter": adapter,
        "base": source.name,
        "output": str(output),
        "trained": trained,
        "file_bytes": (output / ADAPTER_WEIGHTS).stat().st_size,
    }
    print_converted("Imported", result, as_json)
