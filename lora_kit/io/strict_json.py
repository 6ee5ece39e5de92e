"""JSON that others wrote, parsed strictly."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, Final, Never

from lora_kit.io.text import MAX_DIGITS, format_value

JsonObject = dict[str, Any]
"""A JSON object; its values have the types that `json` gives them."""

MAX_NESTING: Final = 64
"""Levels of objects and lists that a JSON text may have."""


def parse_object(text: str) -> JsonObject:
    """Parse a JSON object strictly: no repeated name, no NaN or infinity, no absurd nesting, no absurd number.

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


def _is_deep(value: JsonObject) -> bool:
    """Whether any object or list lies below `MAX_NESTING` levels."""
    level: list[JsonObject | list[object]] = [value]
    for _ in range(MAX_NESTING):
        inside = (parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _build_unique_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{format_value(repeated)} occurs twice")
    return fields


def _refuse_constant(text: str) -> Never:
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
