"""What hostile files cost: sizes are known before they are unpacked, and a limit says its number and the way out."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet  # type: ignore[import-untyped]

from lora_kit.data.readers import read_file
from lora_kit.data.row_encoders import tokenize_batches
from lora_kit.data.rows import read_rows, scan_rows
from lora_kit.data.size_limits import MAX_COLUMNS, MAX_TEXT_LENGTH
from lora_kit.errors import DataError

MEGABYTE = 2**20


def peak_of(path: Path) -> int:
    """Return the most memory that reading a file takes, in bytes, whether it ends in rows or in an error."""
    tracemalloc.start()
    try:
        read_file(path)
    except DataError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.txt"])
def test_a_file_packed_by_gzip_is_the_file(tmp_path: Path, name: str) -> None:
    text = {
        ".jsonl": '{"text": "caf\u00e9"}\n{"text": "b"}\n',
        ".json": '[{"text": "caf\u00e9"}, {"text": "b"}]',
        ".csv": "text\ncaf\u00e9\nb\n",
        ".tsv": "text\ncaf\u00e9\nb\n",
        ".txt": "caf\u00e9\n\nb\n",
    }[Path(name).suffix].encode()
    (tmp_path / name).write_bytes(text)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(text[:9]) + gzip.compress(text[9:]))  # as `cat a.gz b.gz` makes it
    plain, unpacked = read_rows(tmp_path / name), read_rows(packed)
    assert (unpacked.values, unpacked.lines) == (plain.values, plain.lines)
    assert plain.values == (("caf\u00e9",), ("b",))


def test_a_gzip_file_that_is_damaged_or_cut_is_an_error(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n' * 100)
    for contents in (packed[:-4], packed[:20], b"not gzip", packed[:12] + b"\xff\xff" + packed[14:]):
        (tmp_path / "rows.jsonl.gz").write_bytes(contents)
        with pytest.raises(DataError, match=r"rows\.jsonl\.gz: not gzip"):
            read_rows(tmp_path / "rows.jsonl.gz")


def test_a_packed_file_unpacks_to_what_its_size_allows(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * (100 * MEGABYTE), 1))
    assert bomb.stat().st_size < MEGABYTE
    with pytest.raises(
        DataError, match=r"unpacks to 6[78],\d{3},\d{3} bytes or more; at most 6\d,\d{3},\d{3} .*unpack it"
    ):
        read_file(bomb)
    assert peak_of(bomb) < 80 * MEGABYTE


def test_parquet_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    names = ["repeated.parquet", "rows.parquet", "nested.parquet"]
    text, count = "a long prompt of a system " * 4000, 1000
    indices = pyarrow.array([0] * count, pyarrow.int32())
    repeated = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    parquet.write_table(pyarrow.table({"text": repeated}), tmp_path / names[0])
    parquet.write_table(pyarrow.table({"n": pyarrow.nulls(4_500_000)}), tmp_path / names[1])
    messages = pyarrow.array([[{"role": "user", "content": text}]] * count)
    parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / names[2])
    for name in names:
        assert (tmp_path / name).stat().st_size < MEGABYTE, name
        with pytest.raises(DataError, match=rf"{name} has .* at most 67,108,864 are read .*JSONL"):
            read_file(tmp_path / name)
        assert peak_of(tmp_path / name) < 32 * MEGABYTE, name


def test_parquet_of_texts_and_conversations_is_what_arrow_reads(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "messages": [[{"role": "user", "content": f"q{n % 3}"}, {"role": "a", "content": None}] for n in range(9)],
            "text": ["same", None, ""] * 3,
            "n": range(9),
            "pairs": pyarrow.array([[("a", 1)]] * 9, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "raw": pyarrow.array([b"\x00\xff"] * 9),
        }
    )  # fmt: skip
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
    assert [row for _, row in read_file(tmp_path / "rows.parquet").records] == table.to_pylist()


def test_a_row_of_parquet_that_python_has_no_text_for_spoils_no_other(tmp_path: Path) -> None:
    data = pyarrow.py_buffer(b"aXc")
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3)))
    texts = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(data.to_pybytes().replace(b"X", b"\xff")))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    scan = scan_rows(tmp_path / "rows.parquet")
    assert scan.rows.values == (("a",), ("c",))
    assert [(fault.line, fault.what) for fault in scan.faults] == [(2, "not UTF-8: a text of the row")]


def test_columns_cost_what_they_are_and_too_many_are_refused(tmp_path: Path) -> None:
    wide = tmp_path / "wide.csv"
    wide.write_text(",".join(f"c{n}" for n in range(200_000)) + "\n" + "," * 199_999 + "\n", encoding="utf-8")
    started = time.process_time()
    with pytest.raises(DataError, match=rf"wide\.csv:1: the header has 200,000 columns; at most {MAX_COLUMNS:,}"):
        read_file(wide)
    keys = ", ".join(f'"k{n}": 1' for n in range(200_000))
    (tmp_path / "wide.jsonl").write_text(f'{{{keys}, "k199999": 2}}\n', encoding="utf-8")
    with pytest.raises(DataError, match="the key 'k199999' appears twice"):
        read_rows(tmp_path / "wide.jsonl")
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["cell.csv", "cell.tsv", "cell.jsonl", "cell.json", "cell.txt"])
def test_a_cell_costs_at_most_ten_times_its_bytes(tmp_path: Path, name: str) -> None:
    size = 4 * MEGABYTE
    text = "word " * (size // 5)
    as_json = json.dumps({"text": text})
    contents = {
        ".csv": f'text\n"{text}"\n',
        ".tsv": f"text\n{text}\n",
        ".jsonl": as_json,
        ".json": f"[{as_json}]",
        ".txt": text,
    }
    (tmp_path / name).write_text(contents[Path(name).suffix], encoding="utf-8")
    assert peak_of(tmp_path / name) < 10 * size


def test_a_text_that_no_tokenizer_should_see_is_a_fault_of_its_row(tmp_path: Path) -> None:
    rows = [{"text": "a" * (MAX_TEXT_LENGTH + 1), "label": "x"}, {"text": "short", "label": "y"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scan = scan_rows(tmp_path / "rows.jsonl")
    assert scan.rows.values == (("short", "y"),)
    [fault] = scan.faults
    assert (fault.kind, "4,194,305 characters, and at most 4,194,304" in fault.what) == ("long", True)


def test_texts_go_to_the_tokenizer_in_bounded_batches() -> None:
    asked: list[int] = []

    def counting(text: list[str], **options: bool) -> dict[str, list[list[int]]]:
        asked.append(sum(map(len, text)))
        return {"input_ids": [[len(each)] for each in text]}

    texts = ["a" * 300_000, "b" * 900_000, "c", "d" * 1_500_000, "e" * 10, "f" * 10]
    found = list(tokenize_batches(counting, texts))
    assert found == [[len(text)] for text in texts]
    assert asked == [300_000, 900_001, 1_500_000, 20]
    assert list(tokenize_batches(counting, [])) == []
