"""The sizes that a Parquet file states are read as Arrow reads them, and no damaged footer is more than an error."""

from __future__ import annotations

import io
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from lora_kit.data.parquet_footer import read_stated_sizes

TABLE = pyarrow.table(
    {
        "number": list(range(200)),
        "text": ["x" * (n % 7) for n in range(200)],
        "list": [[1, 2]] * 200,
        "struct": [{"k": 1.5}] * 200,
        "switch": [None, True] * 100,
    }
)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many groups": {"row_group_size": 3},
    "page index": {"compression": "zstd", "write_page_index": True},
    "sorted": {"sorting_columns": [pyarrow.parquet.SortingColumn(0)]},
    "old": {"version": "1.0", "use_dictionary": False, "store_schema": False},
    "checksums": {"write_page_checksum": True, "data_page_version": "2.0"},
}
END = b"PAR1"


def write(**form: Any) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(TABLE, stream, **form)
    return stream.getvalue()


def footer_of(content: bytes) -> bytes:
    """Return a file with nothing but this footer."""
    return END + content + len(content).to_bytes(4, "little") + END


@pytest.mark.parametrize("form", FORMS)
def test_the_sizes_of_columns_are_those_that_arrow_reads(form: str) -> None:
    data = write(**FORMS[form])
    metadata = pyarrow.parquet.ParquetFile(io.BytesIO(data)).metadata
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    columns = [group.column(index) for group in groups for index in range(group.num_columns)]
    stated = read_stated_sizes(io.BytesIO(data))
    assert stated.rows == metadata.num_rows
    assert stated.columns == len(columns)
    assert stated.nbytes == sum(column.total_uncompressed_size for column in columns)
    values = sum(column.num_values for column in columns)
    assert values <= stated.values <= 2 * values  # a dictionary has pages, too


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends too early"),
        (b"\x1c" * 100, "nested too deeply"),
        (b"\x19" * 100, "a list of the kind 9"),
        (b"\x19\xfc\xff\xff\xff\xff\x0f", "ends too early"),
        (b"\x18\xff\xff\x7f", "ends too early"),
        (b"\x1b\xff\xff\x7f\x88", "ends too early"),
        (b"\x16" + b"\xff" * 12, "more than 64 bits"),
        (b"\x1e\x00", "unknown kind 14"),
        (b"\x19\x3d" + b"\x00" * 48, "a list of the kind 13"),
        (b"\x49\x1c\x19\x1c\x00\x26\x02\x00\x00", "does not say how large"),
        (b"\x49\x1c\x19\x0c\x26\x01\x00\x00", "does not say how large"),
    ],
)
def test_a_damaged_footer_is_an_error(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_stated_sizes(io.BytesIO(footer_of(content)))


def test_a_page_that_claims_to_have_more_values_than_its_column_counts() -> None:
    data = write(use_dictionary=False, data_page_version="1.0", store_schema=False)
    head = b"\x2c\x15\x90\x03"  # of a data page: 200 values
    start = data.index(head)
    claimed = data[:start] + b"\x2c\x15\x90\x7f" + data[start + 4 :]
    assert read_stated_sizes(io.BytesIO(claimed)).values == read_stated_sizes(io.BytesIO(data)).values - 200 + 8136


def test_a_footer_that_is_longer_than_the_file_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"has 4,294,967,295 bytes; at most 0 are read"):
        read_stated_sizes(io.BytesIO(b"\xff" * 4 + END))
