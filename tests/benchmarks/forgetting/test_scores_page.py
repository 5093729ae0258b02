"""The page on scores shows the tables of the committed rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.forgetting import regimes, variant_scores

PAGE = (Path(regimes.__file__).parent / "methods" / "README.md").read_text()


@pytest.mark.parametrize("script", [regimes, variant_scores])
def test_tables_are_those_of_the_rows(script):
    assert script.table(script.RESULTS) in PAGE
