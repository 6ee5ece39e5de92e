"""Tables as records: CSV and TSV, read by the standard library, and Parquet.

A CSV file may use `,` `;` tab or `|` as its delimiter: the one that its header has most of. Every cell stays as it is
written (`007`, `NA`).
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lora_kit.data.records import OTHER_ENCODING_HINT, Fault, Parsed, Record, Row, decode_utf8, reason_not_utf8
from lora_kit.errors import DataError, format_list

_DELIMITERS: Final = ",;\t|"


def parse_csv(path: Path, contents: bytes) -> Parsed:
    """Parse a CSV file: a header, then rows."""
    text = decode_utf8(path, contents)
    header = next((line for line in text.splitlines() if line.strip()), "")
    return _parse_table(path, text, max(_DELIMITERS, key=header.count))


def parse_tsv(path: Path, contents: bytes) -> Parsed:
    """Parse a file of columns that tabs separate: a header, then rows."""
    return _parse_table(path, decode_utf8(path, contents), "\t")


def _parse_table(path: Path, text: str, delimiter: str) -> Parsed:
    header: list[str] = []
    records: list[Record] = []
    faults: list[Fault] = []
    with _allow_long_cells():
        for line, cells in _iterate_rows(text, delimiter):
            if isinstance(cells, Fault):
                faults.append(cells)
            elif not header:
                header = _parse_header(path, line, cells)
            elif reason := reason_not_utf8(*cells):
                faults.append(Fault(line, reason))
            elif len(cells) != len(header):
                faults.append(Fault(line, f"{len(cells)} cells, and the header has {len(header)}"))
            else:
                records.append((line, dict(zip(header, cells, strict=True))))
    return records, faults


def _iterate_rows(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | Fault]]:
    """Yield the line that each row begins on, and its cells or its fault; skip empty lines."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
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
    reason = reason_not_utf8(*names)
    if reason:
        raise DataError(f"{path}:{line}: {reason}", hint=OTHER_ENCODING_HINT)
    repeated = sorted({name for name in names if names.count(name) > 1})
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


def parse_parquet(path: Path, contents: bytes) -> Parsed:
    """Parse a Parquet file; the numbers of a ClassLabel of `datasets` become its names."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(contents))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet: {' '.join(str(error).split())}") from None
    rows = table.to_pylist()
    if b"huggingface" in (table.schema.metadata or {}):  # the file was written by `datasets`
        from datasets import Features  # type: ignore[import-untyped]

        rows = resolve_class_names(rows, Features.from_arrow_schema(table.schema))
    return list(enumerate(rows, start=1)), []


def resolve_class_names(rows: Iterable[Row], features: Mapping[str, object]) -> list[Row]:
    """Replace the numbers of classes by their names, also within lists; keep a number that has no name.

    Args:
        features: types of the columns, as `datasets` describes them.
    """
    from datasets import ClassLabel

    item_types = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    names = {column: dict(enumerate(kind.names)) for column, kind in item_types.items() if isinstance(kind, ClassLabel)}

    def to_name(column: str, value: Any) -> object:
        if isinstance(value, list):
            return [to_name(column, item) for item in value]
        return names[column].get(value, value)

    return [{key: to_name(key, value) if key in names else value for key, value in row.items()} for row in rows]
