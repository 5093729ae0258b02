"""A folder that is either complete or not there: written beside its place, then renamed into it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output_folder(folder: Path, force: bool, inputs: list[Path], holds: str = "model") -> None:
    """Refuse, before anything is loaded, a folder that must not be replaced.

    Args:
        folder: where the result will be.
        force: whether the user allowed to replace what is there.
        inputs: folders that are read; the result must not replace them.
        holds: what the result is, a "model" or an "adapter".

    Raises:
        ValueError: if ``folder`` is an input or holds one, or holds files of another kind.
        OSError: if it is a file, or not empty without ``force``.
    """
    place = folder.resolve()
    for read in (path.resolve() for path in inputs):
        if place == read or place in read.parents:
            raise ValueError(f"{str(folder)!r} would replace what is read from {str(read)!r}: choose another folder")
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{str(folder)!r} is a file: choose a folder")
    if not place.is_dir() or not any(place.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{str(folder)!r} is not empty: choose another folder, or pass --force to replace it")
    if not (place / {"model": "config.json", "adapter": "adapter_config.json"}[holds]).is_file():
        raise ValueError(
            f"{str(folder)!r} holds files, but no {holds} that --force could replace: choose another folder"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which takes the place of ``folder`` when the block ends without an exception.

    Otherwise it is deleted, and what was at ``folder`` stays as it was.
    """
    place = folder.resolve()  # a link keeps pointing where it points
    place.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    scratch = place.with_name(f".{place.name}.writing-{mark}")
    scratch.mkdir()
    try:
        yield scratch
        if place.exists():
            old = place.with_name(f".{place.name}.replaced-{mark}")
            place.replace(old)
            try:
                scratch.replace(place)
            except BaseException:
                old.replace(place)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.replace(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
