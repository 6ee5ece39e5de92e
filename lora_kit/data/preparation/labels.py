"""Labels that people have misspelt: found, and put right."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Final

from lora_kit.data.rows import Rows
from lora_kit.errors import DataError, format_list, suggest_nearest

_MIN_SIMILARITY: Final = 0.85
"""How alike two labels are at least, where 1 is the same."""
_MIN_FREQUENCY_RATIO: Final = 20
"""How many times as frequent the other label is at least."""


def find_lookalikes(counts: Mapping[str, int]) -> dict[str, str]:
    """A rare label → the frequent one it is likely to be meant for; labels that are numbers are not looked at.

    Args:
        counts: how often each label stands there.
    """
    words = {label: count for label, count in counts.items() if not _is_number(label)}
    found = {}
    for label, count in words.items():
        frequent = {
            _normalize_label(other): other for other, more in words.items() if more >= _MIN_FREQUENCY_RATIO * count
        }
        near = difflib.get_close_matches(_normalize_label(label), frequent, n=1, cutoff=_MIN_SIMILARITY)
        if near:
            found[label] = frequent[near[0]]
    return found


def relabel_rows(rows: Rows, names: Mapping[str, str]) -> Rows:
    """Rows with labels of other names.

    Raises:
        DataError: the rows have no labels, or none of that name.
    """
    if not names:
        return rows
    known = {str(label) for labels in rows.labels for label in labels}
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = suggest_nearest(unknown[0], known) or f"there are {format_list(sorted(known))}"
        raise DataError(f"{rows.path} has no label {unknown[0]!r} to rename", hint=hint)

    def put(label: Any) -> Any:
        if isinstance(label, tuple):
            return tuple(map(put, label))
        new = names.get(str(label))
        return label if new is None else int(new) if isinstance(label, int) and _is_number(new) else new

    values = tuple((value[0], put(value[1]), *value[2:]) for value in rows.values)
    return dataclasses.replace(rows, values=values)


def _normalize_label(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").split())


def _is_number(label: str) -> bool:
    return label.lstrip("-").isdecimal()
