"""Files of every kind as records, by the ending of their names.

.jsonl .ndjson   one JSON object on each line
.json            an array of JSON objects, or JSONL
.csv .tsv        a header, then rows; see `lora_kit.data.tables`
.parquet         one record for each row; see `lora_kit.data.parquet`
.txt             paragraphs, separated by empty lines, each as `{"text": …}`

Each of them but Parquet may be compressed by gzip, and is called `.jsonl.gz`, `.csv.gz` and so on then.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from lora_kit.data.encodings import AUTO_ENCODING, BYTE_ORDER_MARK, UTF8, detect_encoding
from lora_kit.data.parquet import parse_parquet
from lora_kit.data.records import (
    NOT_UTF8,
    Contents,
    Fault,
    Parsed,
    Record,
    check_not_utf16,
    decode_utf8,
    reason_not_utf8,
)
from lora_kit.data.size_limits import check_file_size, unpack_gzip
from lora_kit.data.tables import parse_csv, parse_tsv
from lora_kit.errors import DataError, suggest_nearest

GZIP: Final = ".gz"
JSON: Final = ".json"
PARQUET: Final = ".parquet"
_WHITE_SPACE: Final = re.compile(r"[ \t\r\n]*")
"""What JSON takes for white space."""


def read_file(path: Path, *, encoding: str = UTF8) -> Contents:
    """Read a file of rows whole; the ending of its name decides how it is parsed.

    Args:
        encoding: of a text; `auto` to find it out, see `lora_kit.data.encodings`.

    Raises:
        DataError: the file is missing, is of an unknown kind, is too large, or cannot be parsed at all.
    """
    contents = _read_bytes(path)
    parse = find_parser(path)
    text = unpack_gzip(path, contents) if path.suffix.lower() == GZIP else contents
    if parse is parse_parquet:
        encoding = UTF8
    else:
        encoding = detect_encoding(text) if encoding == AUTO_ENCODING else encoding
        text = _convert_to_utf8(path, text, encoding)
    records: list[Record] = []
    faults: list[Fault] = []
    for item in parse(path, io.BytesIO(text)):
        faults.append(item) if isinstance(item, Fault) else records.append(item)
    return Contents(records, faults, hashlib.sha256(contents).hexdigest(), encoding)


def find_parser(path: Path) -> Callable[[Path, BinaryIO], Parsed]:
    """Return what parses a file, by the ending of its name.

    Raises:
        DataError: files with this ending are not read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = suffixes[-1] if suffixes else ""
    if suffix == GZIP:
        suffix = suffixes[-2] if len(suffixes) > 1 else ""
        suffix = "" if suffix == PARQUET else suffix
    if suffix not in _PARSERS:
        hint = f"kinds: {' '.join(READABLE_SUFFIXES)}, and .gz after them"
        raise DataError(f"{path}: files of this kind are not read", hint=hint)
    return _PARSERS[suffix]


def check_is_file(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        DataError: there is none, or what is there is no regular file.
    """
    try:
        if path.is_dir():
            raise DataError(f"{path} is a folder", hint="give one file")
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is not a regular file")
        return path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", hint=_suggest_file(path)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _read_bytes(path: Path) -> bytes:
    check_file_size(path, check_is_file(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _suggest_file(path: Path) -> str:
    siblings = [str(path.parent / item.name) for item in path.parent.iterdir()] if path.parent.is_dir() else []
    default = "paths count from the working directory; a data set of the hub is owner/name"
    return suggest_nearest(str(path), siblings) or default


def _convert_to_utf8(path: Path, contents: bytes, encoding: str) -> bytes:
    """Return the text in UTF-8, without a byte order mark."""
    if encoding == UTF8:
        check_not_utf16(path, contents)
    contents = contents.removeprefix(BYTE_ORDER_MARK)
    try:
        text = contents if encoding == UTF8 else contents.decode(encoding).encode("utf-8")
    except LookupError:
        raise DataError(f"encoding {encoding!r} is not known", hint="utf-8, utf-16, cp1252, …") from None
    except UnicodeError as error:
        raise DataError(f"{path}: not in {encoding}: {error}") from None
    return text.removeprefix(BYTE_ORDER_MARK)


# JSON


def _parse_jsonl(path: Path, stream: BinaryIO) -> Parsed:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line.decode("utf-8"), object_pairs_hook=_build_unique_dict)
        except UnicodeDecodeError as error:
            yield Fault(number, f"{NOT_UTF8} at byte {error.start} of the line")
        except (RecursionError, ValueError) as error:
            yield Fault(number, _describe_json_error(error))
        else:
            yield _build_record(number, item)


def _parse_json(path: Path, stream: BinaryIO) -> Parsed:
    """Parse an array item by item, so that each has its number; parse JSONL under another name as JSONL."""
    contents = stream.read()
    text = _JsonText(decode_utf8(contents))
    if not text.take("["):
        yield from _parse_jsonl(path, io.BytesIO(contents))
        return
    number, closed = 0, text.take("]")
    while not closed:
        number += 1
        try:
            item, source = text.take_item()
        except (RecursionError, ValueError) as error:
            yield Fault(number, f"{_describe_json_error(error)}; nothing after it can be read")
            return
        reason = reason_not_utf8(source)
        yield Fault(number, reason) if reason else _build_record(number, item)
        closed = text.take("]")
        if not closed and not text.take(","):
            what = f"not JSON: , or ] was expected after it in line {text.line}; nothing after it can be read"
            yield Fault(number, what)
            return
    if not text.at_end:
        yield Fault(number + 1, "there is text after the end of the array")


class _JsonText:
    """A JSON text that is taken apart from left to right; the position never rests on white space."""

    def __init__(self, text: str) -> None:
        self._text, self._position = text, 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_build_unique_dict)
        self._skip_white_space()

    def take(self, mark: str) -> bool:
        """Step over a mark if it is next, and return whether it was."""
        found = self._text.startswith(mark, self._position)
        if found:
            self._position += len(mark)
            self._skip_white_space()
        return found

    def take_item(self) -> tuple[object, str]:
        """Return the next value and its source, and step over it."""
        start = self._position
        item, self._position = self._decoder.raw_decode(self._text, start)
        source = self._text[start : self._position]
        self._skip_white_space()
        return item, source

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        return 1 + self._text.count("\n", 0, self._position)

    @property
    def at_end(self) -> bool:
        return self._position == len(self._text)

    def _skip_white_space(self) -> None:
        space = _WHITE_SPACE.match(self._text, self._position)
        assert space is not None  # it matches nothing, too
        self._position = space.end()


def _build_record(line: int, item: object) -> Record | Fault:
    if isinstance(item, dict):
        return line, item
    return Fault(line, f"a JSON object was expected, found {type(item).__name__}")


class _RepeatedKeyError(ValueError):
    pass


def _build_unique_dict(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise _RepeatedKeyError(f"the key {repeated!r} appears twice")
    return values


def _describe_json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"not JSON: {error.msg} at {line}column {error.colno}"
    return str(error) if isinstance(error, _RepeatedKeyError) else "not JSON that can be read"


# Text


def _parse_txt(path: Path, stream: BinaryIO) -> Parsed:
    first, lines = 0, list[str]()
    for number, raw in enumerate(itertools.chain(stream, [b""]), start=1):
        line = decode_utf8(raw).removesuffix("\n").removesuffix("\r")
        if line.strip():
            first = first if lines else number
            lines.append(line)
        elif lines:
            text = "\n".join(lines)
            reason = reason_not_utf8(text)
            yield Fault(first, reason) if reason else (first, {"text": text})
            lines = []


_PARSERS: Final[Mapping[str, Callable[[Path, BinaryIO], Parsed]]] = {
    ".jsonl": _parse_jsonl,
    ".ndjson": _parse_jsonl,
    JSON: _parse_json,
    ".csv": parse_csv,
    ".tsv": parse_tsv,
    PARQUET: parse_parquet,
    ".txt": _parse_txt,
}
READABLE_SUFFIXES: Final = tuple(_PARSERS)
"""Endings of the files that can be read."""
