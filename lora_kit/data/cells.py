"""The cells of a row, read strictly: texts and lists, or what is wrong with them."""

from __future__ import annotations

from lora_kit.data.records import BAD, EMPTY, LONG, Row
from lora_kit.data.size_limits import MAX_TEXT_LENGTH


class RowError(ValueError):
    """A row that does not match its layout.

    Attributes:
        kind: `bad`, `empty` if the only fault is a missing text, or `long` if a text has too many characters.
    """

    def __init__(self, message: str, *, kind: str = BAD) -> None:
        super().__init__(message)
        self.kind = kind


def read_string(name: str, value: object) -> str:
    """Return a text that holds more than white space."""
    if value is None:
        raise RowError(f"{name} must be a string; NoneType was given", kind=EMPTY)
    if isinstance(value, str) and not value.strip():
        raise RowError(f"{name} is empty", kind=EMPTY)
    if not isinstance(value, str):
        raise RowError(f"{name} must be a string; {type(value).__name__} was given")
    if len(value) > MAX_TEXT_LENGTH:
        what = f"{name} has {len(value):,} characters, and at most {MAX_TEXT_LENGTH:,} are read"
        raise RowError(f"{what}; make several rows of it", kind=LONG)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{name} holds half a surrogate pair, which is not text") from None
    return value


def read_optional_string(name: str, value: object) -> str:
    """Return a text, or an empty string without one."""
    return "" if value is None or value == "" else read_string(name, value)


def read_list(row: Row, key: str) -> list[tuple[int, object]]:
    """Return the items of a list, numbered from 1."""
    items = row[key]
    if not isinstance(items, list):
        raise RowError(f"{key} must be a list; {type(items).__name__} was given")
    return list(enumerate(items, start=1))
