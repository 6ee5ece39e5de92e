"""Rows that are read in chunks: the same rows, the same faults, and memory that does not grow with the file."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_kit.data import row_stream
from lora_kit.data.mixture import DataFile, read_source
from lora_kit.data.record_stream import open_records
from lora_kit.data.row_stream import RowStream, StreamedSource
from lora_kit.data.rows import read_rows
from lora_kit.errors import DataError
from tests.support import texts

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n} ü"} for n in range(10)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_stream, "CHUNK_ROWS", 3)


def write(path: Path) -> Path:
    """Write `ROWS` in the kind that the ending says."""
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=4)
        return path
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    if ".csv" in path.name:
        lines = ["prompt,completion", *(",".join(row.values()) for row in ROWS)]
    content = ("\n".join(lines) + "\n").encode("utf-8-sig" if "mark" in path.name else "utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def values(stream: Iterator[Any]) -> list[Any]:
    return [value for rows in stream for value in rows.values]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.csv", "mark.csv", "mark.jsonl.gz", "a.csv.gz", "a.parquet"]
)
def test_a_stream_has_the_rows_and_lines_that_are_read_whole(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name)
    whole, stream = read_rows(file), RowStream.open(file)
    chunks = list(stream.chunks())
    assert [len(rows) for rows in chunks] == [3, 3, 3, 1]
    assert values(iter(chunks)) == list(whole.values)
    assert [line for rows in chunks for line in rows.lines] == list(whole.lines)
    assert (stream.count, stream.first.format) == (10, whole.format)
    assert values(stream.chunks([0, 4, 9])) == [whole.values[index] for index in (0, 4, 9)]


def test_several_files_are_mixed_as_they_are_in_memory(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl"), write(tmp_path / "b.csv")
    for weights in ((1, 1), (2.5, 0.3), (0.01, 3)):
        source = tuple(DataFile(str(file), weight) for file, weight in zip((one, two), weights, strict=True))
        stream = StreamedSource.open(source, split="train", seed=5)
        assert values(stream.chunks()) == list(read_source(source, split="train", seed=5).values)


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "x", "completion": 5}', '{"prompt": "x"}', "{", '{"prompt": "x", "completion": "y", "label": "z"}'],
)
def test_an_invalid_row_in_a_later_chunk_is_an_error_with_its_line_before_anything_is_done(
    line: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl")
    file.write_text(file.read_text("utf-8") + line + "\n", "utf-8")
    with pytest.raises(DataError) as whole:
        read_rows(file)
    with pytest.raises(DataError) as streamed:
        RowStream.open(file)
    assert str(streamed.value) == str(whole.value)


def test_what_cannot_be_streamed_is_an_error_that_says_why(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text(json.dumps(ROWS), "utf-8")
    with pytest.raises(DataError, match=r"a \.json file is read whole"):
        RowStream.open(array)
    with pytest.raises(DataError, match="no such file"):
        RowStream.open(tmp_path / "absent.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n\n")
    with pytest.raises(DataError, match="has no rows"):
        RowStream.open(empty)
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:-9])
    with pytest.raises(DataError, match="not gzip"):
        RowStream.open(torn)
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * 2**27, compresslevel=1))
    with pytest.raises(DataError, match="unpacks to"):
        RowStream.open(bomb)


def test_a_file_that_shrinks_while_it_is_gone_through_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl")
    stream = RowStream.open(file)
    file.write_text("\n".join(file.read_text("utf-8").splitlines()[:5]) + "\n", "utf-8")
    with pytest.raises(DataError, match="had 10 rows and has 5 now"):
        values(stream.chunks())


def test_a_file_of_any_size_takes_the_memory_of_a_few_rows(tmp_path: Path) -> None:
    file = texts.write(tmp_path / "large.jsonl", [{"prompt": "p" * 1000, "completion": "c" * 1000}] * 2000)
    assert file.stat().st_size > 4_000_000
    tracemalloc.start()
    try:
        with open_records(file, split="train") as parsed:
            assert sum(1 for _ in parsed) == 2000
        streamed = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        read_rows(file)
        whole = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert streamed < 1_000_000 < 4_000_000 < whole
