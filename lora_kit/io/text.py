"""Values and names that others wrote: as text that is short and cannot steer a terminal, and numbers in text."""

from __future__ import annotations

import math
import reprlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lora_kit.errors import ConfigError, LoraKitError, cut_text, escape_and_cut, format_list, suggest_nearest

MAX_DIGITS: Final = 40
"""Digits that a whole number from outside may have."""
_MAX_TEXT_LENGTH: Final = 500
_REPR: Final = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 120
_REPR.maxlevel = 3
_MAX_VALUE_LENGTH: Final = 200


def format_value(value: object) -> str:
    """Return a value from outside as Python writes it, cut short where it is long."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS:
        return f"a number of {value.bit_length():,} bits"
    return cut_text(_REPR.repr(value), most=_MAX_VALUE_LENGTH)


def check_one_of(name: str, value: str, known: Sequence[str], *, error: type[LoraKitError] = ConfigError) -> None:
    """Raise an error unless a value is one of those known; the nearest is named."""
    if value not in known:
        hint = suggest_nearest(str(value), known) or f"known: {format_list(list(known))}"
        raise error(f"{name} {format_value(value)} is not known", hint=hint)


def shorten(message: object, *, most: int = 200) -> str:
    """Return the message of another library, or one that quotes values, as one line, cut after `most` characters."""
    return cut_text(" ".join(str(message).split()), most=most)


def escape_text(value: object) -> str:
    """Return text from outside with its control characters escaped, cut short where it is long."""
    return escape_and_cut(str(value), most=_MAX_TEXT_LENGTH)


def escape_for_terminal(text: str) -> str:
    r"""Return text in which everything that could steer a terminal is escaped: `\x1b`, `\u202e`.

    Line breaks and tabs stay. Names in files that others wrote appear in messages and tables; an escape sequence in
    one must not act.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or not _can_steer_terminal(c) else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _can_steer_terminal(character: str) -> bool:
    # Control characters, surrogates, unassigned ones, and marks that reorder text; joiners inside emoji are harmless.
    category = unicodedata.category(character)
    return category in ("Cc", "Cs", "Co", "Cn") or (category == "Cf" and character not in "\u200c\u200d")


def parse_number(value: object) -> float | None:
    """Return a number, or text that is one, as a float; None for anything else, infinity and NaN included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def format_path_argument(path: Path) -> str:
    """Return a path as an argument of a command: one that begins with a hyphen must not be taken for a flag."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text
