"""Misspelled labels: find them, and rename labels."""

from __future__ import annotations

import dataclasses
import difflib
import unicodedata
from collections import Counter
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
"""For new names of labels: those that differ in case, blanks, umlauts or one slip get the most frequent one."""
_MIN_LETTERS: Final = 4
"""Letters of a label of which one slip is a misspelling: `cat` and `car` are two words."""
_MIN_ROWS: Final = 3
"""Fewest rows of a label from which anything is learned."""
_UMLAUTS: Final = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})
"""How umlauts are written where they cannot be typed; `casefold` writes ß as ss."""


def find_variants(counts: Mapping[str, int], *, known: Collection[str] = ()) -> dict[str, str]:
    """Return each label that differs from a more frequent one only in case, blanks, underscores or umlauts → that one.

    Args:
        counts: how many rows have each label, the most frequent label first.
        known: labels that are right, however frequent they are.
    """
    spellings: dict[str, str] = {}
    for label in (*known, *counts):
        spellings.setdefault(_normalize_label(label), label)
    chosen = {label: spellings[_normalize_label(label)] for label in counts}
    return {label: other for label, other in chosen.items() if label not in (other, *known)}


def choose_spellings(counts: Mapping[str, int], *, known: Collection[str] = ()) -> dict[str, str]:
    """Return each label that differs from a more frequent one in case, blanks, umlauts or one slip → that one.

    Args:
        counts: how many rows have each label, the most frequent label first.
        known: labels that are right, however frequent they are; where there are any, a slip is one of these.
    """
    variants = find_variants(counts, known=known)
    merged: Counter[str] = Counter()
    for label, count in counts.items():
        merged[variants.get(label, label)] += count
    slips = _find_slips_of(known, merged) if known else _find_slips(dict(merged.most_common()))
    names = {label: slips.get(variants.get(label, label), variants.get(label, label)) for label in counts}
    return {label: name for label, name in names.items() if name != label}


def _find_slips(counts: Mapping[str, int]) -> dict[str, str]:
    """Return each rare label → the frequent label that it is one slip away from."""
    return {label: other for label, other in find_lookalikes(counts).items() if _is_slip(label, other)}


def _find_slips_of(known: Collection[str], labels: Collection[str]) -> dict[str, str]:
    """Return each label that is not known → the only known one that it is one slip away from."""
    near = {label: [other for other in known if _is_slip(label, other)] for label in labels if label not in known}
    return {label: others[0] for label, others in near.items() if len(others) == 1}


def _is_slip(one: str, other: str) -> bool:
    """Return whether two words differ in one letter that is wrong, missing or too many, or in two that were swapped."""
    one, other = _normalize_label(one), _normalize_label(other)
    if _is_number(one) or _is_number(other) or min(len(one), len(other)) < _MIN_LETTERS or one == other:
        return False
    start = _count_common(one, other)
    end = _count_common(one[start:][::-1], other[start:][::-1])
    is_one_letter = max(len(one), len(other)) - start - end <= 1
    is_similar = difflib.SequenceMatcher(None, one, other).ratio() >= _MIN_SIMILARITY  # `lost` and `loss` are not
    return (is_one_letter and is_similar) or _is_swapped(one, other)


def _count_common(one: str, other: str) -> int:
    """Return with how many letters both texts begin."""
    return next(
        (index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


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


def find_rare_labels(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the labels that have too few rows to be learned, with how many these are.

    Args:
        counts: how many rows have each label.
    """
    return {label: count for label, count in counts.items() if count < _MIN_ROWS}


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
        values = tuple((words, tuple(map(rename, labels)), *weight) for words, labels, *weight in rows.values)
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
    """Return a label in the spelling that all of its variants share: `Störung_A` as `stoerung a`."""
    folded = unicodedata.normalize("NFC", label).casefold().translate(_UMLAUTS)
    return " ".join(folded.replace("_", " ").split())


def _is_number(label: str) -> bool:
    return label.lstrip("-").isdecimal()
