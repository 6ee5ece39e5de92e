"""Records: the rows of a file as mappings, each with its line, and the faults of the rows that cannot be used.

Text is read as UTF-8. A byte that is not UTF-8 makes its own row a fault, not the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.data.encodings import UTF8, UTF16_MARKS
from lora_kit.errors import DataError

BAD, EMPTY, LONG = "bad", "empty", "long"
"""Kinds of faults: the row does not match its format; a text is missing; the row is too long to be trained on."""

NOT_UTF8: Final = "not UTF-8"
"""The beginning of the fault of a row in another encoding."""
OTHER_ENCODING_HINT: Final = "lora-kit prepare --encoding cp1252 reads it, if that is what it is"
_INVALID_BYTE: Final = re.compile("[\udc80-\udcff]")
"""How `surrogateescape` represents a byte that is not UTF-8."""
_CONTEXT_LENGTH: Final = 20


@dataclass(frozen=True, order=True)
class Fault:
    """A row that cannot be used.

    Attributes:
        line: the line the row begins on, from 1; in a JSON array and in a Parquet file the number of the row.
        what: what is wrong with it.
        kind: `bad`, `empty` or `long`.
    """

    line: int
    what: str
    kind: str = BAD


Row = dict[str, object]
"""A row of a file, by column: the values are whatever JSON, CSV or Parquet hold, and are checked by the layout."""
Record = tuple[int, Row]
"""The line of a row (its number, where files of its kind have no lines), and the row."""
Parsed = Iterator[Record | Fault]
"""The rows of a file in its order: each as a record, or as a fault where it could not be parsed."""


@dataclass(frozen=True)
class Contents:
    """The contents of a file or a data set.

    Attributes:
        records: the rows that could be parsed.
        faults: the rows that could not be parsed.
        sha256: hash of the file, or of the rows of a data set.
        encoding: encoding that the file was read in.
    """

    records: Sequence[Record]
    faults: Sequence[Fault]
    sha256: str
    encoding: str = UTF8


def check_not_utf16(path: Path, contents: bytes) -> None:
    """Raise DataError for contents that begin as UTF-16 does."""
    if contents.startswith(UTF16_MARKS):
        hint = "lora-kit prepare --encoding utf-16 reads it, if that is what it is"
        raise DataError(f"{path}:1: {NOT_UTF8} at byte 0 of the file", hint=hint)


def decode_utf8(contents: bytes) -> str:
    """Decode text, keeping bytes that are not UTF-8 as surrogates, so that only their own rows become faults."""
    return contents.decode("utf-8", "surrogateescape")


def reason_not_utf8(*texts: str) -> str | None:
    """Return which byte of the texts is not UTF-8, or None if all of them are; see `decode_utf8`."""
    for text in texts:
        match = _INVALID_BYTE.search(text)
        if match:
            context = text[: match.start()][-_CONTEXT_LENGTH:]
            return f"{NOT_UTF8}: byte 0x{ord(match[0]) - 0xDC00:02x} in {context!r}…"
    return None
