"""Tables as records: CSV and TSV, read by the standard library.

A CSV file may use `,` `;` tab or `|` as its delimiter: the one that its header has most of. Every cell stays as it is
written (`007`, `NA`).
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from lora_kit.data.records import OTHER_ENCODING_HINT, Fault, Parsed, reason_not_utf8
from lora_kit.data.size_limits import MAX_COLUMNS
from lora_kit.errors import DataError, format_list

_DELIMITERS: Final = ",;\t|"


def parse_csv(path: Path, stream: BinaryIO) -> Parsed:
    """Parse a CSV file: a header, then rows."""
    lines = _decode_lines(stream)
    first: list[str] = []
    while not any(line.strip() for line in first) and (line := next(lines, "")):
        first.append(line)
    header = first[-1] if first else ""
    return _parse_table(path, itertools.chain(first, lines), max(_DELIMITERS, key=header.count))


def parse_tsv(path: Path, stream: BinaryIO) -> Parsed:
    """Parse a file of columns that tabs separate: a header, then rows."""
    return _parse_table(path, _decode_lines(stream), "\t")


def _decode_lines(stream: BinaryIO) -> Iterator[str]:
    """Yield the lines of a text with their ends; bytes that are not UTF-8 stay as surrogates, see `decode_utf8`."""
    return iter(io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=""))


def _parse_table(path: Path, lines: Iterator[str], delimiter: str) -> Parsed:
    header: list[str] = []
    for line, cells in _iterate_rows(lines, delimiter):
        if isinstance(cells, Fault):
            yield cells
        elif not header:
            header = _parse_header(path, line, cells)
        elif reason := reason_not_utf8(*cells):
            yield Fault(line, reason)
        elif len(cells) != len(header):
            yield Fault(line, f"{len(cells)} cells, and the header has {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _iterate_rows(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | Fault]]:
    """Yield the line that each row begins on, and its cells or its fault; skip empty lines."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            with _allow_long_cells():
                cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, Fault(line, f"not CSV: {error}")
        else:
            if any(cell.strip() for cell in cells):
                yield line, cells


def _parse_header(path: Path, line: int, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) > MAX_COLUMNS:
        what = f"{path}:{line}: the header has {len(names):,} columns; at most {MAX_COLUMNS:,} are read"
        raise DataError(what, hint="keep the columns that are trained on; is the separator right?")
    reason = reason_not_utf8(*names)
    if reason:
        raise DataError(f"{path}:{line}: {reason}", hint=OTHER_ENCODING_HINT)
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise DataError(f"{path}:{line}: the header has {format_list(repeated)} twice")
    return names


@contextmanager
def _allow_long_cells() -> Iterator[None]:
    """Lift the `csv` module's limit on the length of a cell for the length of a block."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
