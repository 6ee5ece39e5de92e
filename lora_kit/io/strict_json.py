"""JSON of others, read strictly, and values from it shown safely."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from lora_kit.io.text import MAX_DIGITS, format_value

MAX_NESTING: Final = 64
"""Levels of objects and lists a JSON text may have."""


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object, strictly: no name twice, no NaN or infinity, no absurd nesting or number.

    Raises:
        ValueError: saying what is wrong, with line and column where the text is not JSON.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_build_unique_object,
            parse_constant=_refuse_constant,
            parse_int=_parse_whole_number,
            parse_float=_parse_finite_number,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, found {type(value).__name__}")
    if _is_deep(value):
        raise ValueError(f"nested more than {MAX_NESTING} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether anything lies below more levels than are read."""
    level = [value]
    for _ in range(MAX_NESTING):
        inside = (one.values() if type(one) is dict else one for one in level)
        level = [item for items in inside for item in items if type(item) in (dict, list)]
        if not level:
            return False
    return True


def _build_unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{format_value(twice)} occurs twice")
    return fields


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"not JSON: {text} is not a number there")


def _parse_whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _parse_finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {format_value(text)} is too large")
    return value
