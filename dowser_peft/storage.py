"""Files that are never half-written and never half-read: safetensors only, written beside and renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_safetensors(
    path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write ``tensors`` beside ``path`` and rename: after any failure the old file is intact."""
    with _beside(path) as scratch:
        save_file(tensors, scratch, metadata=metadata)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` beside ``path`` and rename: after any failure the old file is intact."""
    with _beside(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def _beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    path = Path(path).resolve()  # through a link, not over it
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        scratch = Path(folder, path.name)
        yield scratch
        scratch.replace(path)


def check_safetensors(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a file whose header is unreadable or whose data is cut short; reads only the header.

    Raises:
        ValueError: naming the file, what it should be, and what is wrong with it.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"the {what} file {os.fspath(path)!r} is truncated or corrupted ({error}); copy or save it again"
        ) from error
