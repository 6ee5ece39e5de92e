"""Lines that fit a width: no word is broken, nothing is lost, and narrow columns stay whole."""

from __future__ import annotations

import pytest

from lora_kit.cli.text_layout import lay_out_table, measure_width, wrap_words

HEADER = ("adapter", "targets", "size", "digest")
ROWS = [
    ("mood-of-a-very-long-name", "down_proj, gate_proj, k_proj, o_proj, q_proj", "949.6 kB", "ad08d48d936e"),
    ("b", "v_proj", "1.2 GB", "d3387c239cd6"),
]


def words_of(rows: list[tuple[str, ...]]) -> list[str]:
    return sorted(word for row in rows for cell in row for word in cell.split())


@pytest.mark.parametrize("width", [1, 30, 58, 60, 80, 120])
def test_a_table_breaks_no_word_and_loses_none(width: int) -> None:
    lines, _ = lay_out_table(HEADER, ROWS, width)
    shown = [word for line in lines for word in line.split()]
    assert set(words_of(ROWS)) <= set(shown)
    assert max(map(len, lines)) <= max(width, len("  targets  mood-of-a-very-long-name"))


def test_a_table_that_fits_has_a_line_for_each_row() -> None:
    lines, heads = lay_out_table(HEADER, ROWS, 120)
    assert (len(lines), heads) == (3, 1)
    assert [line.index("949" if "949" in line else "1.2" if "1.2" in line else "size") for line in lines] == [72] * 3


def test_the_widest_column_is_wrapped_and_short_cells_stay_whole() -> None:
    lines, _ = lay_out_table(HEADER, ROWS, 80)
    assert any("949.6 kB  ad08d48d936e" in line for line in lines)
    assert lines[1].startswith("mood-of-a-very-long-name  down_proj, gate_proj,")
    assert all(line.startswith(" " * 26) for line in lines[2:-1])


def test_columns_that_can_be_spared_go_first() -> None:
    lines, heads = lay_out_table(HEADER, ROWS, 48, spare=("digest",))
    assert heads == 1
    assert "digest" not in lines[0]
    assert "size" in lines[0]


def test_what_fits_in_no_columns_is_a_block_for_each_row() -> None:
    lines, heads = lay_out_table(HEADER, ROWS, 40)
    assert heads == 0
    assert lines[0] == "mood-of-a-very-long-name"
    assert lines[-4:] == ["b", "  targets  v_proj", "  size     1.2 GB", "  digest   d3387c239cd6"]


def test_wide_characters_take_two_columns() -> None:
    lines, _ = lay_out_table(("", ""), [("日本語", "x"), ("ab", "y")], 80)
    assert lines == ["日本語  x", "ab      y"]
    assert max(map(measure_width, wrap_words("日本語 日本語 日本語", 13))) == 13


def test_lines_of_a_cell_stay_lines() -> None:
    lines, _ = lay_out_table(("", ""), [("bad", "two lines\nof findings"), ("", "z")], 80)
    assert lines == ["bad  two lines", "     of findings", "     z"]


def test_wrapped_text_hangs() -> None:
    assert wrap_words("a bb cc dd", 5, indent="- ", hang="  ") == ["- a", "  bb", "  cc", "  dd"]
    assert wrap_words("unbreakable", 4) == ["unbreakable"]
    assert wrap_words("", 4) == [""]


def test_a_fact_that_is_too_long_stands_below_its_name() -> None:
    rows = [("digest", "a" * 30), ("modules_to_save", "none"), ("note", "some words that are wrapped")]
    lines, _ = lay_out_table(("", ""), rows, 40)
    assert lines == [
        "digest",
        f"  {'a' * 30}",
        "modules_to_save  none",
        "note             some words that are",
        "                 wrapped",
    ]
