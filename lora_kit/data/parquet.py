"""Parquet as records, one for each row, with its size known before it is unpacked.

A value that many rows have is written once, and Python would hold it once for each row. So texts are read as
dictionaries, row group by row group, and what they come to is added up before any of them becomes a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from lora_kit.data.parquet_footer import read_stated_sizes
from lora_kit.data.records import NOT_UTF8, Fault, Parsed, Row
from lora_kit.data.size_limits import check_unpacked_size
from lora_kit.errors import DataError
from lora_kit.io.text import shorten

if TYPE_CHECKING:
    import pyarrow.parquet  # type: ignore[import-untyped]

_VALUE_BYTES: Final = 16
"""Bytes that a value without a length of its own counts for, as a number or a null."""
_BATCH_ROWS: Final = 1024
"""Rows that become Python values at once."""


def parse_parquet(path: Path, stream: BinaryIO, *, is_streamed: bool = False) -> Parsed:
    """Parse a Parquet file; the numbers of a ClassLabel of `datasets` become its names.

    Args:
        is_streamed: whether no more than a row group is kept in memory, so that the file may be of any size.

    Raises:
        DataError: it is damaged, or unpacks to more than a file of its size may.
    """
    packed = stream.seek(0, 2)
    stream.seek(0)
    file = _open(path, stream)
    _check_sizes(path, stream, file.metadata, packed, is_streamed=is_streamed)
    names, size, number = _read_class_names(path, file.schema_arrow), 0, 0
    for index in range(file.metadata.num_row_groups):
        with _translate_arrow_errors(path):
            table = file.read_row_group(index)
            size += sum(_measure_values(chunk) for column in table.columns for chunk in column.chunks)
        check_unpacked_size(path, size, packed, is_streamed=is_streamed)
        for start in range(0, table.num_rows, _BATCH_ROWS):
            with _translate_arrow_errors(path):
                rows = _convert_rows(_expand_texts(table.slice(start, _BATCH_ROWS)))
            for row in rows:
                number += 1
                yield Fault(number, row) if isinstance(row, str) else (number, replace_class_numbers(row, names))


def _expand_texts(table: Any) -> object:
    """Return a table with the texts of its dictionary columns as plain columns, which Python reads twice as fast."""
    import pyarrow

    columns = [
        column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    return pyarrow.table(columns, names=table.column_names)


def _convert_rows(table: Any) -> list[Row | str]:
    """Return rows as Python values; of a row that Python has no values for, what is wrong with it."""
    try:
        rows: list[Row | str] = table.to_pylist()
        return rows
    except UnicodeDecodeError:
        reason = f"{NOT_UTF8}: a text of the row"
    except (ValueError, OverflowError) as error:
        reason = f"a value cannot be read: {' '.join(str(error).split())}"
    if table.num_rows == 1:
        return [reason]
    return [row for index in range(table.num_rows) for row in _convert_rows(table.slice(index, 1))]


def _open(path: Path, stream: BinaryIO) -> pyarrow.parquet.ParquetFile:
    import pyarrow
    import pyarrow.parquet

    with _translate_arrow_errors(path):
        schema = pyarrow.parquet.ParquetFile(stream).schema
        texts = [column.path for column in map(schema.column, range(len(schema))) if _is_text(column)]
        stream.seek(0)
        return pyarrow.parquet.ParquetFile(stream, read_dictionary=texts)


def _is_text(column: Any) -> bool:
    return str(column.physical_type) == "BYTE_ARRAY"


@contextlib.contextmanager
def _translate_arrow_errors(path: Path) -> Iterator[None]:
    """Raise what Arrow raises of a damaged file as a DataError: errors of its own, of Python's, and those of C++."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, IndexError, RuntimeError) as error:
        raise DataError(f"{path}: not Parquet: {shorten(error)}") from None


def _check_sizes(
    path: Path, stream: BinaryIO, metadata: pyarrow.parquet.FileMetaData, packed: int, *, is_streamed: bool
) -> None:
    """Raise DataError if the columns, as the file describes them, are too large to be unpacked."""
    try:
        stated = read_stated_sizes(stream)
    except ValueError as error:
        raise DataError(f"{path}: not Parquet: {error}") from None
    columns = metadata.num_row_groups * metadata.num_columns
    if (stated.columns, stated.rows) != (columns, metadata.num_rows):
        listed = f"{stated.rows:,} rows and {stated.columns:,} columns are listed"
        what = f"{metadata.num_rows:,} rows and {columns:,} columns are stated, and {listed}"
        raise DataError(f"{path}: not Parquet: {what}")
    for size in (stated.nbytes, _VALUE_BYTES * stated.values, _VALUE_BYTES * stated.rows):
        check_unpacked_size(path, size, packed, is_streamed=is_streamed)


def _measure_values(array: Any) -> int:
    """Return the bytes of the values of an Arrow array, each counted as often as it stands there."""
    import pyarrow
    import pyarrow.compute  # type: ignore[import-untyped]

    kind = array.type
    if pyarrow.types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(array.dictionary)
        total = pyarrow.compute.sum(lengths.take(array.indices)).as_py()
        return len(array) + (total or 0)
    if pyarrow.types.is_struct(kind):
        return sum(map(_measure_values, array.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_map(kind):
        return len(array) + _measure_values(array.flatten() if not pyarrow.types.is_map(kind) else array.items)
    return int(array.nbytes)


# Classes


def _read_class_names(path: Path, schema: Any) -> dict[str, dict[int, str]]:
    """Return the names of the classes of each column by number, if `datasets` wrote the file."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features  # type: ignore[import-untyped]

    try:
        return find_class_names(Features.from_arrow_schema(schema))
    except Exception as error:  # whatever `datasets` raises for a description that it cannot read
        what = f"{path}: the description of its columns cannot be read: {' '.join(str(error).split())}"
        raise DataError(what, hint="write it again without the metadata `huggingface`") from None


def find_class_names(features: Mapping[str, object]) -> dict[str, dict[int, str]]:
    """Return the names of the classes of each column that has any, by number.

    Args:
        features: types of the columns, as `datasets` describes them.
    """
    from datasets import ClassLabel

    item_types = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    return {column: dict(enumerate(kind.names)) for column, kind in item_types.items() if isinstance(kind, ClassLabel)}


def resolve_class_names(rows: Iterable[Row], features: Mapping[str, object]) -> Iterator[Row]:
    """Yield rows with the names of classes in place of their numbers; see `find_class_names`."""
    names = find_class_names(features)
    return (replace_class_numbers(row, names) for row in rows)


def replace_class_numbers(row: Row, names: Mapping[str, Mapping[int, str]]) -> Row:
    """Return a row with the names of classes, also within lists; a number that has no name stays.

    Args:
        names: by column and number.
    """
    if not names:
        return row

    def to_name(column: str, value: object) -> object:
        if isinstance(value, list):
            return [to_name(column, item) for item in value]
        return names[column].get(value, value) if isinstance(value, int) else value

    return {key: to_name(key, value) if key in names else value for key, value in row.items()}
