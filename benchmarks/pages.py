"""Tables from rows, between the markers of a page: a line ``<!-- NAME -->`` and a line ``<!-- end of NAME -->``."""

from __future__ import annotations

import re
from pathlib import Path


def section(page: str, name: str) -> str:
    """The text between the markers of ``name``.

    Raises:
        ValueError: if a marker is missing.
    """
    return _between(page, name)[1].removesuffix("\n")


def with_section(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of ``name``.

    Raises:
        ValueError: if a marker is missing.
    """
    found = _between(page, name)
    return f"{page[: found.start(1)]}{text}\n{page[found.end(1) :]}"


def write_section(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the markers of ``name`` in a file."""
    path.write_text(with_section(path.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def _between(page: str, name: str) -> re.Match[str]:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    found = re.search(f"{re.escape(begin)}\n(.*?){re.escape(end)}", page, re.DOTALL)
    if found is None:
        raise ValueError(f"there is no {begin!r} followed by {end!r}: put both where the text belongs")
    return found
