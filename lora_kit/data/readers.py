"""Files of every kind as records: a mapping for each row, with the line it stands on, and a fault for what is none.

.jsonl .ndjson   one JSON object on each line
.json            an array of JSON objects, or JSONL
.csv .tsv        a header, then rows; a CSV may be separated by `,` `;` tabs or `|`, whichever its header has most
.parquet         one row each; the numbers of a ClassLabel of `datasets` become its names
.txt             paragraphs, which empty lines part, each as `{"text": …}`
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import DataError, format_list, suggest_nearest

BAD, EMPTY, LONG = "bad", "empty", "long"
"""Kinds of faults: not readable as a row of its format; without text; too long to be trained on."""
_DELIMITERS: Final = ",;\t|"


@dataclass(frozen=True, order=True)
class Fault:
    """A row that cannot be used.

    Attributes:
        line: where it begins, from 1; in a JSON array and in a Parquet file the number of the row.
        what: what is wrong with it.
        kind: `bad`, `empty` or `long`.
    """

    line: int
    what: str
    kind: str = BAD


Record = tuple[int, dict[str, Any]]
"""A row and its line, or its number where files of its kind have no lines."""


@dataclass(frozen=True)
class Contents:
    """What stands in a file, and what in it cannot be read.

    Attributes:
        records: its rows.
        faults: what is none.
        sha256: of the file, or of the rows of a data set.
    """

    records: Sequence[Record]
    faults: Sequence[Fault]
    sha256: str


NOT_UTF8: Final = "not UTF-8"
"""How the fault of a row begins that is in another encoding."""
OTHER_ENCODING: Final = "lora-kit prepare --encoding cp1252 reads it, if that is what it is"
_UTF16: Final = (b"\xff\xfe", b"\xfe\xff")
_STRAY: Final = re.compile("[\udc80-\udcff]")
_STRAY_CONTEXT: Final = 20
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""What spreadsheets put before a text in UTF-8, also where later lines are in another encoding."""


def read_file(path: Path, *, encoding: str = "utf-8") -> Contents:
    """What stands in a file; the ending of its name says what kind of file it is.

    Raises:
        DataError: no file of a kind that is known, or none of it can be read.
    """
    suffix = path.suffix.lower()
    contents = _read_bytes(path)
    if suffix not in _READERS:
        raise DataError(f"{path}: files of this kind are not read", hint=f"kinds: {' '.join(READABLE_SUFFIXES)}")
    text = (
        contents
        if suffix == ".parquet"
        else _convert_to_utf8(path, contents.removeprefix(_BYTE_ORDER_MARK), encoding).removeprefix(_BYTE_ORDER_MARK)
    )
    return Contents(*_READERS[suffix](path, text), hashlib.sha256(contents).hexdigest())


def _read_bytes(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder", hint="give one file")
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        here = [str(path.parent / item.name) for item in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = (
            suggest_nearest(str(path), here)
            or "paths count from the working directory; a data set of the hub is owner/name"
        )
        raise DataError(f"{path}: no such file", hint=hint) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _convert_to_utf8(path: Path, contents: bytes, encoding: str) -> bytes:
    """The contents in UTF-8."""
    try:
        return contents if encoding == "utf-8" else contents.decode(encoding).encode("utf-8")
    except LookupError:
        raise DataError(f"encoding {encoding!r} is not known", hint="utf-8, utf-16, cp1252, …") from None
    except UnicodeError as error:
        raise DataError(f"{path}: not in {encoding}: {error}") from None


def _decode_utf8(path: Path, contents: bytes) -> str:
    """The contents, in which a byte that is not UTF-8 stands for itself: it spoils its own row alone.

    Raises:
        DataError: all of it is in UTF-16.
    """
    if contents.startswith(_UTF16):
        hint = "lora-kit prepare --encoding utf-16 reads it, if that is what it is"
        raise DataError(f"{path}:1: {NOT_UTF8} at byte 0 of the file", hint=hint)
    return contents.decode("utf-8", "surrogateescape")


def _reason_not_utf8(text: str) -> str:
    """What is wrong with a row of this text; nothing where it was UTF-8."""
    found = _STRAY.search(text)
    return (
        f"{NOT_UTF8}: byte 0x{ord(found[0]) - 0xDC00:02x} in {text[: found.start()][-_STRAY_CONTEXT:]!r}…"
        if found
        else ""
    )


# JSON


def _read_jsonl(path: Path, contents: bytes) -> tuple[list[Record], list[Fault]]:
    rows: list[Record] = []
    faults: list[Fault] = []
    for number, line in enumerate(contents.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=_build_unique_dict)
        except UnicodeDecodeError as error:
            faults.append(Fault(number, f"{NOT_UTF8} at byte {error.start} of the line"))
        except (RecursionError, ValueError) as error:
            faults.append(Fault(number, _describe_json_error(error)))
        else:
            _append_row_or_fault(number, row, rows, faults)
    return rows, faults


def _read_json(path: Path, contents: bytes) -> tuple[list[Record], list[Fault]]:
    """An array, item by item, so that each has its number; JSONL under another name is read as such."""
    text = _decode_utf8(path, contents)
    place = _skip_white_space(text, 0)
    if not text.startswith("[", place):
        return _read_jsonl(path, contents)
    rows: list[Record] = []
    faults: list[Fault] = []
    decoder = json.JSONDecoder(object_pairs_hook=_build_unique_dict)
    number, place = 0, _skip_white_space(text, place + 1)
    closed = text.startswith("]", place)
    while not closed:
        number += 1
        try:
            item, end = decoder.raw_decode(text, place)
        except (RecursionError, ValueError) as error:
            return rows, [*faults, Fault(number, f"{_describe_json_error(error)}; nothing after it can be read")]
        stray = _reason_not_utf8(text[place:end])
        if stray:
            faults.append(Fault(number, stray))
        else:
            _append_row_or_fault(number, item, rows, faults)
        place = _skip_white_space(text, end)
        closed = text.startswith("]", place)
        if not closed and not text.startswith(",", place):
            line = 1 + text.count("\n", 0, place)
            what = f"not JSON: , or ] was expected after it in line {line}; nothing after it can be read"
            return rows, [*faults, Fault(number, what)]
        place = place if closed else _skip_white_space(text, place + 1)
    if _skip_white_space(text, place + 1) < len(text):
        faults.append(Fault(number + 1, "something stands after the end of the array"))
    return rows, faults


def _skip_white_space(text: str, place: int) -> int:
    """The next place without white space."""
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _append_row_or_fault(line: int, row: Any, rows: list[Record], faults: list[Fault]) -> None:
    if isinstance(row, dict):
        rows.append((line, row))
    else:
        faults.append(Fault(line, f"a JSON object was expected, found {type(row).__name__}"))


class _RepeatedKeyError(ValueError):
    pass


def _build_unique_dict(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _describe_json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"not JSON: {error.msg} at {line}column {error.colno}"
    return str(error) if isinstance(error, _RepeatedKeyError) else "not JSON that can be read"


# Tables


def _read_csv(path: Path, contents: bytes) -> tuple[list[Record], list[Fault]]:
    text = _decode_utf8(path, contents)
    header = next((line for line in text.splitlines() if line.strip()), "")
    return _read_table(path, text, max(_DELIMITERS, key=header.count))


def _read_tsv(path: Path, contents: bytes) -> tuple[list[Record], list[Fault]]:
    return _read_table(path, _decode_utf8(path, contents), "\t")


def _read_table(path: Path, text: str, delimiter: str) -> tuple[list[Record], list[Fault]]:
    """Read by the standard library: it keeps every cell as it is written (`007`, `NA`) and knows its line."""
    header: list[str] = []
    rows: list[Record] = []
    faults: list[Fault] = []
    with _allow_long_cells():
        for line, cells in _iterate_cells(text, delimiter):
            stray = "" if isinstance(cells, str) else _first_reason_not_utf8(cells)
            if isinstance(cells, str):
                faults.append(Fault(line, cells))
            elif not header:
                header = _read_header(path, line, cells)
            elif stray:
                faults.append(Fault(line, stray))
            elif len(cells) != len(header):
                faults.append(Fault(line, f"{len(cells)} cells, and the header has {len(header)}"))
            else:
                rows.append((line, dict(zip(header, cells, strict=True))))
    return rows, faults


def _iterate_cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """The line each row begins on, and its cells or what is wrong with it; empty lines are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not CSV: {error}"
        else:
            if any(cell.strip() for cell in cells):
                yield line, cells


def _first_reason_not_utf8(cells: Iterable[str]) -> str:
    return next(filter(None, map(_reason_not_utf8, cells)), "")


def _read_header(path: Path, line: int, cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    stray = _first_reason_not_utf8(names)
    if stray:
        raise DataError(f"{path}:{line}: {stray}", hint=OTHER_ENCODING)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:{line}: the header has {format_list(twice)} twice")
    return names


@contextmanager
def _allow_long_cells() -> Iterator[None]:
    """Cells of any length, within."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, contents: bytes) -> tuple[list[Record], list[Fault]]:
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


def resolve_class_names(rows: Iterable[Mapping[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of `datasets` in which classes, and lists of classes, stand by their names; a number that has none stays."""
    from datasets import ClassLabel

    classes = {key: getattr(kind, "feature", kind) for key, kind in features.items()}
    names = {key: dict(enumerate(kind.names)) for key, kind in classes.items() if isinstance(kind, ClassLabel)}

    def named(key: str, value: Any) -> Any:
        return [named(key, item) for item in value] if isinstance(value, list) else names[key].get(value, value)

    return [{key: named(key, value) if key in names else value for key, value in row.items()} for row in rows]


# Text


def _read_txt(path: Path, contents: bytes) -> tuple[list[Record], list[Fault]]:
    rows: list[Record] = []
    open_ = False
    for number, line in enumerate(_decode_utf8(path, contents).replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            if open_:
                rows[-1][1]["text"] += "\n" + line
            else:
                rows.append((number, {"text": line}))
        open_ = bool(line.strip())
    faults = [Fault(number, stray) for number, row in rows if (stray := _reason_not_utf8(row["text"]))]
    wrong = {fault.line for fault in faults}
    return [row for row in rows if row[0] not in wrong], faults


_READERS: Final = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
READABLE_SUFFIXES: Final = tuple(_READERS)
"""Endings of the files that are read."""
