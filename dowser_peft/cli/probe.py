"""``dowser-peft probe``: what the method needs to know about a model, measured once and kept in a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dowser_peft.cli.common import (
    AsJson,
    Debug,
    Dtype,
    TrustRemoteCode,
    human_bytes,
    note,
    print_facts,
    print_json,
    shows_progress,
)


def probe(
    model: Annotated[str, typer.Argument(help="The model: a local folder or a hub id.", metavar="MODEL")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, e.g. stats.safetensors.")],
    num_prompts: Annotated[int, typer.Option(min=1, help="N: prompts that the model writes for itself.")] = 64,
    num_probes: Annotated[int, typer.Option(min=1, help="R: Rademacher vectors per prompt.")] = 8,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="End as soon as this share of the trained weights, in (0, 1), is expected to differ from those of an "
            "unlimited probe; 0.05 is about the paper's accuracy. Then R = 1, and N times R prompts are the limit."
        ),
    ] = None,
    rho: Annotated[float, typer.Option(help="Fraction of trained weights that --tolerance is measured at.")] = 0.1,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 64,
    images: Annotated[
        bool,
        typer.Option("--images", help="Put an image of noise before each prompt that a multimodal model writes."),
    ] = False,
    estimator: Annotated[
        str, typer.Option(metavar="rms|mean_abs", help="rms: the paper. mean_abs: the authors' code.")
    ] = "rms",
    seed: Annotated[int, typer.Option(help="Of the prompts, their images and the Rademacher vectors.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Prompts per forward pass; default: from free memory.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature of the prompts.")] = 0.9,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling threshold of the prompts.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="Repetition penalty of the prompts.")] = 1.05,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the hub.")] = None,
    dtype: Dtype = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Where the model goes: auto, cpu, cuda:0, ...; default: a GPU if there is one.")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Quantise to 4 bit (NF4) on loading.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Probe a model once, and keep the statistics in a small file.

    The model writes its own prompts; no data is needed. The file serves every rho and every task:
    DowserConfig(importance="stats.safetensors").

    Examples:

        dowser-peft probe llava-hf/llava-1.5-7b-hf -o llava.safetensors
        dowser-peft probe ./model -o stats.safetensors --num-prompts 32 --seed 1
        dowser-peft probe ./model -o stats.safetensors --tolerance 0.05
    """
    import torch

    from dowser_peft import DowserConfig
    from dowser_peft import probe as probe_model
    from dowser_peft.cli.models import Source, load_model, load_tokenizer
    from dowser_peft.cli.statistics_report import mask_error_fact

    config = DowserConfig(  # checks the values, before a model is loaded
        num_prompts=num_prompts,
        num_probes=num_probes,
        prompt_length=prompt_length,
        estimator=estimator,  # type: ignore[arg-type]  # DowserConfig checks it
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        probe_images=images,
        probe_tolerance=tolerance,
        rho=rho,
        probe_batch_size=batch_size,
        seed=seed,
    )
    _check_output(output)
    source = Source(model, revision, trust_remote_code)
    if device_map is None and torch.cuda.is_available():
        device_map = "auto"
    loaded = load_model(source, dtype, device_map, load_in_4bit)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        note("the model comes without a tokenizer: its configuration tells which tokens are special")
    started = time.perf_counter()
    statistics = probe_model(loaded, **config.probe_settings(), tokenizer=tokenizer, progress=shows_progress())
    seconds = time.perf_counter() - started
    statistics.save(output)
    file_bytes = output.stat().st_size
    used = num_prompts if tolerance is None else statistics.num_prompts
    if as_json:
        print_json(
            {
                "model": model,
                "output": str(output),
                "modules": len(statistics.module_names),
                "num_prompts": used,
                "num_probes": statistics.num_probes,
                "prompt_length": prompt_length,
                "images": statistics.images,
                "estimator": estimator,
                "seed": seed,
                "mask_error": statistics.mask_error,
                "mask_error_rho": statistics.mask_error_rho,
                "fingerprint": statistics.fingerprint,
                "file_bytes": file_bytes,
                "seconds": round(seconds, 3),
            }
        )
        return
    print_facts(
        f"Probed {model}",
        {
            "modules": f"{len(statistics.module_names)}, {statistics.module_names[0]} ...",
            "prompts": f"N = {used} of {prompt_length} tokens{' behind an image' if images else ''}, "
            f"R = {statistics.num_probes} probes each",
            **mask_error_fact(statistics),
            "time": f"{seconds:.1f} s",
            "file": f"{output} ({human_bytes(file_bytes)})",
            "use it": f"DowserConfig(importance={str(output)!r}, rho=0.1)",
        },
    )


def _check_output(output: Path) -> None:
    """Refuse, before anything is loaded, to write where statistics cannot or must not be written."""
    from dowser_peft import ProbeStatistics

    if output.is_dir():
        raise IsADirectoryError(f"{str(output)!r} is a folder: name a file in it, such as stats.safetensors")
    if output.exists():
        try:
            ProbeStatistics.load(output)
        except ValueError as error:
            raise ValueError(
                f"{str(output)!r} exists and is not a file of probe statistics: choose another name, or delete it"
            ) from error
    output.parent.mkdir(parents=True, exist_ok=True)
