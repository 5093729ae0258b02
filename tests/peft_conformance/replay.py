"""PEFT tests written for LoRA alone that say something about any method, replayed with ours.

Much of PEFT's machinery (state dicts, injection, ``low_cpu_mem_usage``, ``all-linear``, name clashes) is tested
with LoRA only, because built-in methods share that machinery. A third-party method has to show that it does.
While such a test runs, ``LoraConfig`` in its module is a class that takes LoRA's arguments and makes our
configuration.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator
from typing import Any

import pytest

from .rows import MagnitudeDowserConfig

_NAME = " Dowser for LoRA"

# fnmatch patterns of "file::Class::test".
REPLAYED: tuple[str, ...] = ()

_RENAMED = {"init_lora_weights": "init_weights"}
_MEANINGLESS = {"r", "lora_alpha", "lora_dropout"}


class DowserForLora(MagnitudeDowserConfig):
    """Our configuration, made from the arguments of a ``LoraConfig``."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs = {_RENAMED.get(key, key): value for key, value in kwargs.items() if key not in _MEANINGLESS}
        if kwargs.get("bias") == "lora_only":
            kwargs["bias"] = "dowser_only"
        super().__init__(**kwargs)


def applies(item: pytest.Item) -> bool:
    """Whether a collected test is one of those replayed."""
    path = "::".join(part.name for part in item.listchain() if isinstance(part, (pytest.Module, pytest.Class)))
    path = f"{path}::{getattr(item, 'originalname', None) or item.name}".rsplit("/", 1)[-1]
    return any(fnmatch.fnmatch(path, pattern) for pattern in REPLAYED)


def rename(item: pytest.Item) -> None:
    """Say in a replayed test's name that it is not the original."""
    if applies(item):
        item.name += _NAME
        item._nodeid += _NAME


@contextlib.contextmanager
def in_place_of_lora(item: pytest.Item) -> Iterator[None]:
    """Replace ``LoraConfig`` in the module of a replayed test."""
    if not item.name.endswith(_NAME):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item.module, "LoraConfig", DowserForLora)
        yield
