"""Text that fits a width: words wrapped at spaces, tables wrapped by column. No word is ever broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

Row: TypeAlias = tuple[str, ...]

_GAP: Final = 2
"""Blanks between two columns."""
_MAX_WHOLE: Final = 12
"""Columns up to which a cell is never wrapped: a size with its unit, two numbers."""


def measure_width(text: str) -> int:
    """Return how many columns of a terminal one line of text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def wrap_words(text: str, width: int, *, indent: str = "", hang: str = "") -> list[str]:
    """Return text in lines of at most `width` columns, broken at spaces; a longer word has a line of its own.

    Args:
        indent: what the first line begins with.
        hang: what further lines begin with.
    """
    lines = list[str]()
    for number, line in enumerate(text.split("\n")):
        current = hang if number else indent
        if measure_width(current + line) <= width:
            lines.append(current + line)
            continue
        is_empty = True
        for word in line.split():
            longer = current + ("" if is_empty else " ") + word
            if is_empty or measure_width(longer) <= width:
                current, is_empty = longer, False
            else:
                lines.append(current)
                current = hang + word
        lines.append(current)
    return lines


def lay_out_table(header: Row, rows: Sequence[Row], width: int, *, spare: Sequence[str] = ()) -> tuple[list[str], int]:
    """Return a table in lines of at most `width` columns, and how many of them are its header.

    Where the columns do not fit even at the width of their longest words, those that can be spared are left out, and
    then each row becomes a block of lines, one for each column. Two columns without titles are facts: a name, and what
    there is to say of it, below the name where it does not fit beside it.

    Args:
        spare: titles of columns that may be left out, the first one first.
    """
    if len(header) == 2 and not any(header):
        return _lay_out_facts(rows, width), 0
    lines = [header, *rows] if any(header) else list(rows)
    shown, dropped = list(range(len(header))), [header.index(title) for title in spare if title in header]
    while (widths := _fit_columns([[row[column] for row in lines] for column in shown], width)) is None:
        if not dropped:
            return _lay_out_blocks(header, rows, width), 0
        shown.remove(dropped.pop(0))
    blocks = [_lay_out_row([row[column] for column in shown], widths) for row in lines]
    return [line for block in blocks for line in block], len(blocks[0]) if any(header) else 0


def _fit_columns(columns: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Return the width of each column; None where not even their longest words fit."""
    longest = [max(map(_measure_longest_line, column)) for column in columns]
    least = [max(map(_measure_unbroken, column)) for column in columns]
    available = width - _GAP * (len(columns) - 1)
    if sum(longest) <= available:
        return longest
    if sum(least) > available:
        return None
    # The widest columns are wrapped, all at one width, so that narrow ones stay whole.
    cap = max(cap for cap in range(available + 1) if sum(_clamp(cap, least, longest)) <= available)
    widths = _clamp(cap, least, longest)
    for column, size in enumerate(longest):
        widths[column] += min(size - widths[column], available - sum(widths))
    return widths


def _clamp(cap: int, least: Sequence[int], longest: Sequence[int]) -> list[int]:
    return [min(high, max(low, cap)) for low, high in zip(least, longest, strict=True)]


def _measure_longest_line(cell: str) -> int:
    return _measure_longest(cell, str.splitlines)


def _measure_unbroken(cell: str) -> int:
    """Return the columns that a cell takes at least."""
    whole = _measure_longest_line(cell)
    return whole if whole <= _MAX_WHOLE else _measure_longest(cell, str.split)


def _measure_longest(cell: str, split: Callable[[str], list[str]]) -> int:
    return max(map(measure_width, split(cell)), default=0)


def _lay_out_row(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    wrapped = [wrap_words(cell, width) for cell, width in zip(cells, widths, strict=True)]
    lines = list[str]()
    for number in range(max(map(len, wrapped))):
        parts = [column[number] if number < len(column) else "" for column in wrapped]
        padded = (part + " " * (width - measure_width(part)) for part, width in zip(parts, widths, strict=True))
        lines.append((" " * _GAP).join(padded).rstrip())
    return lines


def _lay_out_blocks(header: Row, rows: Sequence[Row], width: int) -> list[str]:
    """Return a block for each row: its first cell, then a line for each further one that is not empty."""
    label_width = max(map(measure_width, header[1:]), default=0)
    lines = list[str]()
    for row in rows:
        lines += wrap_words(row[0], width)
        for title, cell in zip(header[1:], row[1:], strict=True):
            label = f"  {title}{' ' * (label_width - measure_width(title) + _GAP)}" if label_width else "  "
            lines += wrap_words(cell, width, indent=label, hang=" " * len(label)) if cell else []
    return lines


def _lay_out_facts(rows: Sequence[Row], width: int) -> list[str]:
    column = max(measure_width(name) for name, _ in rows) + _GAP
    lines = list[str]()
    for name, fact in rows:
        label = name + " " * (column - measure_width(name))
        if column + _measure_unbroken(fact) <= width:
            lines += wrap_words(fact, width, indent=label, hang=" " * column)
        else:
            lines += [name, *wrap_words(fact, width, indent=" " * _GAP, hang=" " * _GAP)]
    return [line.rstrip() for line in lines]
