"""Text between the markers of a page."""

from __future__ import annotations

import pytest

from benchmarks import pages

PAGE = "before\n<!-- a table -->\nold\nlines\n<!-- end of a table -->\nafter\n"


def test_the_section_goes_between_the_markers() -> None:
    once = pages.with_section(PAGE, "a table", "new \\1")
    assert once == "before\n<!-- a table -->\nnew \\1\n<!-- end of a table -->\nafter\n"
    assert pages.with_section(once, "a table", "new \\1") == once
    empty = "<!-- t -->\n<!-- end of t -->\n"
    assert pages.with_section(empty, "t", "new") == "<!-- t -->\nnew\n<!-- end of t -->\n"


def test_the_section_is_read_as_it_was_written() -> None:
    assert pages.section(PAGE, "a table") == "old\nlines"


def test_a_page_without_markers_is_refused_and_left_alone(tmp_path) -> None:
    path = tmp_path / "page.md"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="there is no '<!-- t -->' .* put both where the text belongs"):
        pages.write_section(path, "t", "new")
    assert path.read_text() == "no markers"


def test_other_sections_of_a_file_stay(tmp_path) -> None:
    path = tmp_path / "page.md"
    path.write_text(PAGE + PAGE.replace("a table", "other"))
    pages.write_section(path, "other", "new")
    assert pages.section(path.read_text(), "a table") == "old\nlines"
    assert pages.section(path.read_text(), "other") == "new"
