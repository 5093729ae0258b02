"""What README says is true: its tables come from committed rows, its files and links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import quantised_merge
from benchmarks.forgetting import report, rows, tables
from benchmarks.pages import section
from dowser_peft.cli import demo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_is_that_of_the_committed_rows() -> None:
    assert section(README, "demo table") == tables.table(demo.TASK)


def test_the_table_of_what_is_forgotten_is_that_of_the_committed_rows() -> None:
    assert section(README, report.SECTION) == report.overview_table(rows.read())


def test_the_table_of_quantised_merges_is_that_of_the_committed_rows() -> None:
    assert section(quantised_merge.README.read_text(), quantised_merge.SECTION) == quantised_merge.table()


def test_the_demo_uses_the_best_rate_of_each_method() -> None:
    runs = tables.load_runs()
    assert tables.best_rates(runs[runs["task"] == demo.TASK]) == demo.LEARNING_RATES


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_file_tree() -> None:
    tree = re.search(r"    dowser_peft/\n((?:    .*\n)+)", README)
    assert tree is not None
    names = [line.split()[0] for line in tree[1].splitlines()]
    inside = [name for name, line in zip(names, tree[1].splitlines(), strict=True) if line.startswith(" " * 6)]
    for name in inside:
        assert (ROOT / "dowser_peft" / name).exists(), name
    for name in set(names) - set(inside):
        assert (ROOT / name).exists(), name
    shown = {name.rstrip("/") for name in inside} | {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    assert {path.name for path in (ROOT / "dowser_peft").iterdir()} <= shown
