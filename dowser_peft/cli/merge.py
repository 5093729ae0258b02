"""``dowser-peft merge``: base model + adapter = an ordinary model that needs neither PEFT nor this package."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dowser_peft.cli.common import (
    AsJson,
    Debug,
    Dtype,
    TrustRemoteCode,
    human_bytes,
    print_facts,
    print_json,
    shows_progress,
)
from dowser_peft.cli.models import (
    Source,
    adapter_config,
    adapter_folder,
    base_source,
    load_model,
    model_files,
)
from dowser_peft.cli.output_folder import check_output_folder, replacing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dowser_peft import DowserConfig

# Files that belong together: all of a group come from the first folder that has its first file.
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
)
_PROCESSOR_FILES = ("*processor_config.json", "processor_config.json")


def merge(
    adapter: Annotated[str, typer.Argument(help="The adapter: a local folder or a hub id.", metavar="ADAPTER")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write the merged model to.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model, if not where the adapter says.")
    ] = None,
    dtype: Dtype = "auto",
    load_in_4bit: Annotated[
        bool,
        typer.Option(
            "--load-in-4bit",
            help="Round the base to 4 bit (NF4) and back, as it was while a QLoRA-style adapter trained.",
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Split the weights into files of at most this, such as 5GB.")
    ] = "50GB",
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is already in the folder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base model, and save a model that loads in plain transformers.

    In the same precision, the merged model answers exactly as the adapted one. Tokenizer and processor come
    along. The folder is written beside its place and renamed, so it never holds half a model. An adapter that
    was trained on a 4-bit base is merged into the unquantised one; --load-in-4bit merges into what it knew.

    Examples:

        dowser-peft merge ./adapter -o ./merged
        dowser-peft merge ./adapter -o ./merged --base ./model --dtype bfloat16
    """
    started = time.perf_counter()
    folder = adapter_folder(adapter)
    config = adapter_config(folder)
    source = base_source(config, base, trust_remote_code, "--base")
    check_output_folder(output, force, [folder, Path(source.name).expanduser()])
    model = load_model(source, dtype, load_in_4bit=load_in_4bit)
    was_quantised = _unquantise(model, dtype)
    if not was_quantised:
        _warn_about_unquantised_base(config)
    adapted = _load_adapter(model, folder)
    trained = sum(p.numel() for name, p in adapted.named_parameters() if ".dowser_values." in name)
    merged = adapted.merge_and_unload(progressbar=shows_progress(), safe_merge=True)
    with replacing(output) as scratch:
        # The names in a quantised checkpoint cannot be restored: they include those of its scales.
        merged.save_pretrained(scratch, save_original_format=not was_quantised, max_shard_size=max_shard_size)
        copied = list(_copy_companions(folder, source, scratch))
        weights = _check_saved(scratch)
    file_bytes = sum((output / name).stat().st_size for name in weights)
    result = {
        "adapter": adapter,
        "base": source.name,
        "output": str(output),
        "model_class": type(merged).__name__,
        "dtype": str(merged.dtype).removeprefix("torch."),
        "trained": trained,
        "weights": weights,
        "copied": copied,
        "file_bytes": file_bytes,
        "seconds": round(time.perf_counter() - started, 3),
    }
    if as_json:
        print_json(result)
        return
    print_facts(
        f"Merged {adapter}",
        {
            "base": f"{source.name} ({result['model_class']}, {result['dtype']})",
            "delta": f"{trained:,} weights",
            "saved": f"{output} ({human_bytes(file_bytes)} in {len(weights)} file{'s' * (len(weights) > 1)})",
            "copied": ", ".join(copied) or "no tokenizer or processor: neither the adapter nor the base has one",
            "time": f"{result['seconds']:.1f} s",
            "use it": f"{result['model_class']}.from_pretrained({str(output)!r})",
        },
    )


def _unquantise(model: PreTrainedModel, dtype: str) -> bool:
    """Turn a base that was loaded quantised into an ordinary one, in place; returns whether it was."""
    import torch

    if getattr(model, "hf_quantizer", None) is None:
        return False
    model.dequantize(dtype=model.dtype if dtype == "auto" else getattr(torch, dtype))
    return True


def _warn_about_unquantised_base(config: DowserConfig) -> None:
    from dowser_peft.fingerprint import is_of_quantised_base

    if is_of_quantised_base(config.base_fingerprint):
        warnings.warn(
            "this adapter was trained on a quantised base and is merged into the unquantised one, which computes a "
            "little differently: after a 4-bit base, --load-in-4bit merges into what it was trained on",
            stacklevel=2,
        )


def _load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The base model with the adapter.

    Raises:
        ValueError: if the modules of the adapter are not those that it adapts in this base model.
    """
    from peft import PeftModel

    from dowser_peft.cli.adapter_report import module_names
    from dowser_peft.tuner_layer import DowserLayer

    saved = set(module_names(folder))
    adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
    layers = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, DowserLayer)}
    if odd := sorted(saved ^ layers):
        only = "the adapter" if odd[0] in saved else "the base model"
        raise ValueError(
            f"the adapter does not fit this base model: {odd[0]!r} is only in {only}. Pass the right one with --base"
        )
    return adapted


def _copy_companions(adapter: Path, source: Source, into: Path) -> Iterator[str]:
    """Copy tokenizer and processor, from the adapter if it has its own, else from the base; yields their names."""
    patterns = [*_TOKENIZER_FILES, *_PROCESSOR_FILES] + (["*.py"] if source.trust_remote_code else [])
    base = model_files(source, patterns)
    for group in (_TOKENIZER_FILES, _PROCESSOR_FILES):
        found = _matching(adapter, group) or _matching(base, group)
        for file in found:
            shutil.copyfile(file, into / file.name)
            yield file.name
    for file in _matching(base, ("*.py",)) if source.trust_remote_code else []:
        shutil.copyfile(file, into / file.name)
        yield file.name


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _check_saved(folder: Path) -> list[str]:
    """Names of the weight files in ``folder``, each read back as far as its header.

    Raises:
        ValueError: if a file is damaged or misses a weight that the index says it has.
    """
    from safetensors import safe_open

    from dowser_peft.storage import check_safetensors

    stored: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        check_safetensors(file, "merged weights")
        with safe_open(file, framework="pt") as opened:
            stored[file.name] = set(opened.keys())
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if key not in stored.get(name, ()):
                raise ValueError(f"the merged model is incomplete: {name} has no {key!r}; is the disk full?")
    if not any(stored.values()) or not (folder / "config.json").is_file():
        raise ValueError("the merged model is incomplete: it has no weights or no config.json; is the disk full?")
    return list(stored)
