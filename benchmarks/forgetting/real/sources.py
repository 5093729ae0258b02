"""Where the rows of a data set come from: the hub, a folder with the same files, or annotations as LLaVA has them.

A folder given for a data set takes the place of the hub. It holds the data set's parquet files as downloaded, or
``train.json`` and ``test.json`` (or ``.jsonl``) in the layout in which LLaVA and the authors of Model-Dowser publish
annotations, with the images beside them. The files are named to ``datasets`` one by one: of a folder with a README it
would recognise the name only, and give the rows that another folder of that name once had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

Split = Literal["train", "test"]


class DataError(RuntimeError):
    """A data set that is not there, or holds something else than expected."""


@dataclass(frozen=True)
class Source:
    """A data set on the hub.

    Args:
        path: its name there.
        test: the split with the test questions.
        train: the split to learn from; "" if nothing learns from it, the same as ``test`` if there is only one.
        config: its configuration, if it has several.
        page: where it is found if the hub's page is not it.
    """

    path: str
    test: str
    train: str = ""
    config: str | None = None
    page: str = ""

    def split(self, split: Split) -> str:
        return self.train if split == "train" else self.test


def is_annotated(folder: Path | None) -> bool:
    """Whether a folder holds annotations in LLaVA's layout."""
    return folder is not None and _annotations(folder, "test") is not None


def _annotations(folder: Path, split: Split) -> Path | None:
    return next((path for end in ("json", "jsonl") if (path := folder / f"{split}.{end}").is_file()), None)


def load(name: str, source: Source, split: Split, folder: Path | None, columns: list[str]) -> Dataset:
    """The rows of a split.

    Args:
        name: of the task, for messages.
        source: where the data set is on the hub.
        split: "train" or "test".
        folder: takes the place of the hub.
        columns: which it must have.

    Raises:
        DataError: if the data set is not there, or lacks a column; says how to get it.
    """
    if folder is not None and not folder.is_dir():
        raise DataError(f"{name}: there is no folder {str(folder)!r}; check --data {name}=FOLDER")
    if folder is None:
        options: dict[str, Any] = {"name": source.config, "split": source.split(split)}
        rows = _attempt(name, source, folder, lambda: load_dataset(source.path, **options))
    else:
        kind, files = _files(name, source, split, folder)
        rows = _attempt(name, source, folder, lambda: load_dataset(kind, data_files=files, split="train"))
    if missing := [column for column in columns if column not in rows.column_names]:
        raise DataError(
            f"{name}: the {source.split(split)} split of {folder or source.path} has no column {missing[0]!r}, but "
            f"{', '.join(rows.column_names)}. Expected are the columns of {source.path}"
        )
    return rows


def _files(name: str, source: Source, split: Split, folder: Path) -> tuple[str, list[str]]:
    """Kind and paths of the files of a split."""
    if is_annotated(folder):
        path = _annotations(folder, split)
        if path is None:
            raise DataError(f"{name}: {str(folder)!r} has test but no train annotations: put train.json beside them")
        return "json", [str(path)]
    wanted = source.split(split)
    found = sorted(path for path in folder.rglob("*.parquet") if path.name.startswith((f"{wanted}-", f"{wanted}.")))
    if source.config is not None:
        found = [path for path in found if source.config in path.relative_to(folder).parts] or found
    if not found:
        raise DataError(
            f"{name}: {str(folder)!r} has neither test.json (LLaVA's layout) nor parquet files of the split "
            f"{wanted!r} (such as {wanted}-00000-of-00001.parquet). Download {source.path} with "
            f"`hf download --repo-type dataset {source.path} --local-dir FOLDER`"
        )
    return "parquet", [str(path) for path in found]


def _attempt(name: str, source: Source, folder: Path | None, read: Callable[[], Dataset]) -> Dataset:
    try:
        return read()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        found = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if folder is not None:
            raise DataError(f"{name}: cannot read {str(folder)!r} as {source.path} ({found})") from error
        page = source.page or f"https://huggingface.co/datasets/{source.path}"
        raise DataError(
            f"{name}: cannot load {source.path} ({found}). It is at {page}; if it asks to accept terms, do so there "
            f"and log in with `hf auth login`. Without a network, download it elsewhere and pass --data {name}=FOLDER"
        ) from error
