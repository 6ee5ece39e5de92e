"""Misspelled labels: find them, and rename labels."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Final

from lora_kit.data.layouts import RowValue
from lora_kit.data.rows import Rows
from lora_kit.errors import DataError, format_list, suggest_nearest

_MIN_SIMILARITY: Final = 0.85
"""Least similarity of two lookalikes, where 1 is the same text."""
_MIN_FREQUENCY_RATIO: Final = 20
"""How many times as frequent as its misspelling a label must be."""


AUTO: Final = "auto"
"""For new names of labels: those that differ only in case or blanks get the most frequent spelling."""


def find_variants(counts: Mapping[str, int], *, known: Collection[str] = ()) -> dict[str, str]:
    """Return each label that differs from a more frequent one only in case, blanks or underscores → that one.

    Args:
        counts: how many rows have each label, the most frequent label first.
        known: labels that are right, however frequent they are.
    """
    spellings: dict[str, str] = {}
    for label in (*known, *counts):
        spellings.setdefault(_normalize_label(label), label)
    chosen = {label: spellings[_normalize_label(label)] for label in counts}
    return {label: other for label, other in chosen.items() if label not in (other, *known)}


def find_lookalikes(counts: Mapping[str, int]) -> dict[str, str]:
    """Return each rare label → the frequent label that it is probably a misspelling of; numbers are not considered.

    Args:
        counts: how many rows have each label.
    """
    words = {label: count for label, count in counts.items() if not _is_number(label)}
    lookalikes = {}
    for label, count in words.items():
        frequent = {
            _normalize_label(other): other for other, more in words.items() if more >= _MIN_FREQUENCY_RATIO * count
        }
        name = _normalize_label(label)
        near = [other for other in frequent if _is_swapped(name, other)]
        near = near or difflib.get_close_matches(name, frequent, n=1, cutoff=_MIN_SIMILARITY)
        if near:
            lookalikes[label] = frequent[near[0]]
    return lookalikes


def relabel_rows(rows: Rows, names: Mapping[str, str]) -> Rows:
    """Rename labels.

    Args:
        names: new names, by old name.

    Raises:
        DataError: no row has a label of an old name.
    """
    if not names:
        return rows
    known = {str(label) for labels in rows.labels for label in labels}
    unknown = [name for name in names if name not in known]
    if unknown:
        hint = suggest_nearest(unknown[0], known) or f"there are {format_list(sorted(known))}"
        raise DataError(f"{rows.path} has no label {unknown[0]!r} to rename", hint=hint)

    def rename(label: str | int | float) -> str | int | float:
        new = names.get(str(label))
        if new is None:
            return label
        return int(new) if isinstance(label, int) and _is_number(new) else new

    values: tuple[RowValue, ...]
    if rows.format == "words":
        values = tuple((words, tuple(map(rename, labels))) for words, labels in rows.values)
    else:
        values = tuple(_relabel_text(value, rename) for value in rows.values)
    return dataclasses.replace(rows, values=values)


def _relabel_text(value: RowValue, rename: Callable[[str | int], str | int | float]) -> RowValue:
    """Return a text with new names of its labels; two that get one name become one."""
    text, label, *weight = value
    new = tuple(dict.fromkeys(map(rename, label))) if isinstance(label, tuple) else rename(label)
    return (text, new, *weight)


def _is_swapped(one: str, other: str) -> bool:
    """Return whether two texts differ in two neighboring letters that changed places, which is one slip of a typist."""
    if len(one) != len(other):
        return False
    places = [index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return len(places) == 2 and places[1] == places[0] + 1 and sorted(one) == sorted(other)


def _normalize_label(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").split())


def _is_number(label: str) -> bool:
    return label.lstrip("-").isdecimal()
