"""What differs between two runs, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from lora_kit.io.text import escape_text


def describe_differences(was: Mapping[str, object], now: Mapping[str, object], *, within: str = "") -> Iterator[str]:
    """Yield a line for each leaf that differs between two nested mappings."""
    for key in sorted({*was, *now}):
        name, old, new = f"{within}{key}", was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from describe_differences(old, new, within=f"{name}.")
        elif old != new:
            yield f"{name} was {_format_value(old)}, is {_format_value(new)}"


def _format_value(value: object) -> str:
    return "not set" if value is None else escape_text(json.dumps(value, default=str))
