"""The data of ``dowser-peft train``: from the hub, a folder or a file, in the columns that TRL trains on.

    text                         language modelling, or the column named by --dataset_text_field
    prompt, completion           loss on the completion
    messages                     conversations of {"role", "content"}
    conversations                the same as {"from", "value"}, as LLaVA's and ShareGPT's files have them
    image, images                beside these: pictures, or their paths under --image_folder

What is wrong with the data is said here, before a model is loaded, and in the user's terms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import PIL.Image
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_ROLES = {"human": "user", "gpt": "assistant"}  # of LLaVA's and ShareGPT's files
_PLACEHOLDER = "<image>"  # where such a file has the picture in the text
IMAGE_COLUMNS = ("image", "images")


def load_data(
    name: str,
    config: str | None,
    split: str | None,
    text_field: str,
    image_folder: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Load one split and bring it into the columns that TRL trains on.

    Args:
        name: hub id, folder or file.
        config: configuration on the hub.
        split: which split, or part of one; None for the one to test on: 'test', 'validation', or the only one.
        text_field: column with the text of language modelling.
        image_folder: where paths of images begin; None for the folder of the file.
        streaming: read it while training.

    Raises:
        ValueError: if it cannot be read, is empty, or has no column to train on.
        OSError: if it, or an image that it names, does not exist.
    """
    try:
        found = _load(name, config, split, streaming)
        if split is None and isinstance(found, dict):
            found = found[_test_split(list(found))]
        first = next(iter(found), None)
    except (StopIteration, IndexError):  # of datasets, on empty files
        first = None
    except (DatasetsError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        raise ValueError(f"cannot read the dataset {name!r}: {error.__cause__ or error}") from error
    if first is None:
        raise ValueError(f"the dataset {name!r} has no examples" + (f" in its split {split!r}" if split else ""))
    _check_columns(name, first, text_field)
    _check_cells(name, found, text_field)
    column = next((column for column in IMAGE_COLUMNS if column in first), None)
    if column is not None and (found.features is None or not _are_paths(found.features[column])):
        column = None
    if "conversations" in first:
        found = _with_messages(found, first, column)
    if column is not None:
        found = _with_pictures(found, column, Path(image_folder).expanduser() if image_folder else _folder_of(name))
    return found


def has_images(example: dict[str, Any]) -> bool:
    """Whether an example is of a dataset with images, as TRL decides it."""
    return any(column in example for column in IMAGE_COLUMNS)


def _load(name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    path = Path(name).expanduser()
    suffix = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    if suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"no data file {name!r}: check the path")
        if suffix == ".tsv":
            options["sep"] = "\t"
        return datasets.load_dataset(_BUILDERS[suffix], data_files=str(path), **options)
    if path.is_file():
        raise ValueError(f"it is no {', '.join(_BUILDERS)} file")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(path)
        if isinstance(saved, Dataset) or split is None:
            return saved
        if split not in saved:
            raise ValueError(f"it has no split {split!r}, but {', '.join(saved)}")
        return saved[split]
    return datasets.load_dataset(str(path) if path.is_dir() else name, config, **options)


def _test_split(splits: list[str]) -> str:
    for split in ("test", "validation"):
        if split in splits:
            return split
    if len(splits) == 1:
        return splits[0]
    raise ValueError(f"which of its splits is held out? Pass --retention_split, one of {', '.join(splits)}")


def _folder_of(name: str) -> Path:
    path = Path(name).expanduser()
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def _kept_columns(example: dict[str, Any], text_field: str) -> list[str]:
    """The columns that training reads; empty if there are none that it could."""
    for columns in (["prompt", "completion"], ["messages"], ["conversations"], ["input_ids"], [text_field]):
        if all(column in example for column in columns):
            return columns
    return []


def _check_columns(name: str, example: dict[str, Any], text_field: str) -> None:
    if not _kept_columns(example, text_field):
        raise ValueError(
            f"the dataset {name!r} has no column to train on: that would be {text_field!r} (named by "
            "--dataset_text_field), 'messages', 'conversations', or 'prompt' and 'completion'. It has "
            f"{', '.join(map(repr, example)) or 'none'}"
        )


def _check_cells(name: str, dataset: Dataset | IterableDataset, text_field: str) -> None:
    if not isinstance(dataset, Dataset):
        return
    for column in _kept_columns(dict.fromkeys(dataset.column_names), text_field):
        if empty := dataset.data.column(column).null_count:
            raise ValueError(
                f"the dataset {name!r} has {empty} empty cells in its column {column!r}: remove or fill these rows"
            )


def _with_pictures(dataset: Dataset | IterableDataset, column: str, folder: Path) -> Dataset | IterableDataset:
    """Paths become ``images``, in each row a list of pictures, which are read when they are needed."""

    is_stream = isinstance(dataset, IterableDataset)

    def pictures(example: dict[str, Any]) -> dict[str, Any]:
        paths = [_found(folder / path) for path in _paths(example[column])]
        return {"images": [PIL.Image.open(path) for path in paths] if is_stream else paths}

    features = dataset.features.copy()
    del features[column]
    features["images"] = datasets.List(datasets.Image())
    return dataset.map(pictures, remove_columns=["image"] if column == "image" else None, features=features)


def _paths(cell: str | list[str] | None) -> list[str]:
    return [cell] if isinstance(cell, str) else cell or []


def _are_paths(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")


def _found(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"the data name the image {str(path)!r}, which does not exist: see --image_folder")
    return str(path)


def _with_messages(
    dataset: Dataset | IterableDataset, first: dict[str, Any], paths: str | None
) -> Dataset | IterableDataset:
    """``conversations`` become ``messages``; with images, each placeholder in a text becomes a part of its own.

    Args:
        dataset: the data.
        first: its first example.
        paths: column with the paths of images: a row must have a place for each, or training would end there, hours
            later. Pictures themselves are not counted, because they would be read for it.
    """
    turns = first["conversations"]
    if not (isinstance(turns, list) and turns and {"from", "value"} <= set(turns[0])):
        return dataset  # TRL reads those of role and content itself
    multimodal = has_images(first)

    def convert(example: dict[str, Any]) -> dict[str, Any]:
        messages = []
        for turn in example["conversations"]:
            content = _parts(turn["value"]) if multimodal else turn["value"]
            messages.append({"role": _ROLES.get(turn["from"], turn["from"]), "content": content})
        if paths is not None:
            places = sum(part["type"] == "image" for message in messages for part in message["content"])
            if places != (images := len(_paths(example[paths]))):
                raise ValueError(
                    f"a conversation has {places} {_PLACEHOLDER!r} for {images} images: "
                    f"{example['conversations'][0]['value']!r}"
                )
        return {"messages": messages}

    features = dataset.features.copy() if dataset.features is not None else None
    if features is not None:  # a stream does not find out by itself
        del features["conversations"]
        text = datasets.Value("string")
        content = datasets.List({"type": text, "text": text}) if multimodal else text
        features["messages"] = datasets.List({"role": text, "content": content})
    return dataset.map(convert, remove_columns=["conversations"], features=features)


def _parts(text: str) -> list[dict[str, str | None]]:
    parts: list[dict[str, str | None]] = []
    for index, piece in enumerate(text.split(_PLACEHOLDER)):
        if index:
            parts.append({"type": "image", "text": None})
        if piece.strip("\n"):
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts or [{"type": "text", "text": ""}]
