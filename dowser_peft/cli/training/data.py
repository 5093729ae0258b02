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
    except DatasetsError as error:
        if isinstance(error, OSError | ValueError):
            raise
        raise ValueError(f"cannot read the dataset {name!r}: {error.__cause__ or error}") from error
    if split is None and isinstance(found, dict):
        found = found[_test_split(name, list(found))]
    first = next(iter(found), None)
    if first is None:
        raise ValueError(f"the dataset {name!r} has no examples" + (f" in its split {split!r}" if split else ""))
    _check_columns(name, first, text_field)
    _check_cells(name, found, text_field)
    column = next((column for column in IMAGE_COLUMNS if column in first), None)
    if column is None or found.features is None or not _are_paths(found.features[column]):
        return _with_messages(found, first) if "conversations" in first else found
    folder = Path(image_folder).expanduser() if image_folder else _folder_of(name)
    found = _with_lists_of_paths(found, column, folder)
    if "conversations" in first:
        found = _with_messages(found, first, counted=True)
    return found.cast_column("images", datasets.List(datasets.Image()))  # from here on read when they are needed


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
        raise ValueError(f"the data file {name!r} is none of {', '.join(_BUILDERS)}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(path)
        if isinstance(saved, Dataset) or split is None:
            return saved
        if split not in saved:
            raise ValueError(f"the dataset {name!r} has no split {split!r}: it has {', '.join(saved)}")
        return saved[split]
    return datasets.load_dataset(str(path) if path.is_dir() else name, config, **options)


def _test_split(name: str, splits: list[str]) -> str:
    for split in ("test", "validation"):
        if split in splits:
            return split
    if len(splits) == 1:
        return splits[0]
    raise ValueError(f"which split of {name!r} is held out? Pass --retention_split, one of {', '.join(splits)}")


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


def _with_lists_of_paths(dataset: Dataset | IterableDataset, column: str, folder: Path) -> Dataset | IterableDataset:
    """``images`` as lists of paths that exist; a row without a picture has an empty one."""

    def to_list(example: dict[str, Any]) -> dict[str, Any]:
        paths = example[column]
        return {"images": [_found(folder / path) for path in ([paths] if isinstance(paths, str) else paths or [])]}

    features = dataset.features.copy()
    features.pop("image", None)
    features["images"] = datasets.List(datasets.Value("string"))
    return dataset.map(to_list, remove_columns=["image"] if column == "image" else None, features=features)


def _are_paths(feature: Any) -> bool:
    inner = feature.feature if isinstance(feature, datasets.List) else feature
    return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")


def _found(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"the data name the image {str(path)!r}, which does not exist: see --image_folder")
    return str(path)


def _with_messages(
    dataset: Dataset | IterableDataset, first: dict[str, Any], counted: bool = False
) -> Dataset | IterableDataset:
    """``conversations`` become ``messages``; with images, each placeholder in a text becomes a part of its own.

    Args:
        dataset: the data.
        first: its first example.
        counted: refuse a row without a place for each of its pictures, at which training would end hours later. Not
            of pictures that would have to be read for it.
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
        if counted:
            places = sum(part["type"] == "image" for message in messages for part in message["content"])
            if places != len(example["images"]):
                raise ValueError(
                    f"a conversation has {places} {_PLACEHOLDER!r} for {len(example['images'])} images: "
                    f"{example['conversations'][0]['value']!r}"
                )
        return {"messages": messages}

    return dataset.map(convert, remove_columns=["conversations"])


def _parts(text: str) -> list[dict[str, str | None]]:
    parts: list[dict[str, str | None]] = []
    for index, piece in enumerate(text.split(_PLACEHOLDER)):
        if index:
            parts.append({"type": "image", "text": None})
        if piece.strip("\n"):
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts or [{"type": "text", "text": ""}]
