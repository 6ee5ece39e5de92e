"""Columns with labels: of a text, of a pair of texts, or of each word of a text.

label      one label, a string or a whole number; or the number that a regression predicts
labels     the labels that apply to a text, perhaps none: a list, in a table as JSON (`["a", "b"]`)
text_pair  a second text
weight     how much the row counts in the loss, above 0; 1 without it
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

from lora_kit.data.cells import RowError, read_list, read_string
from lora_kit.data.records import EMPTY, Row
from lora_kit.io.text import parse_number

TextInput = str | tuple[str, str]
"""A text, or a pair of texts."""
Label = str | int | float | tuple[str | int, ...]
"""One label, a number to be predicted, or all labels that apply."""

Words = tuple[str, ...]
WordLabels = tuple[str | int, ...]

PAIR, WEIGHT = "text_pair", "weight"
_Input = TypeVar("_Input")
_Target = TypeVar("_Target")


def read_labeled_text(row: Row) -> tuple[TextInput, Label] | tuple[TextInput, Label, float]:
    """Return a text or a pair of texts, its label, and its weight if it has one."""
    return _add_weight(row, (read_text_input(row), _read_label_or_number("label", row["label"])))


def read_text_with_labels(row: Row) -> tuple[TextInput, Label] | tuple[TextInput, Label, float]:
    """Return a text or a pair of texts, the labels that apply to it, and its weight if it has one."""
    return _add_weight(row, (read_text_input(row), _read_label_set(row["labels"])))


def read_text_input(row: Row) -> TextInput:
    """Return the text of a row, or a pair of texts where there is a second one."""
    text = read_string("text", row["text"])
    return (text, read_string(PAIR, row[PAIR])) if row.get(PAIR) is not None else text


def _add_weight(row: Row, value: tuple[_Input, _Target]) -> tuple[_Input, _Target] | tuple[_Input, _Target, float]:
    weight = row.get(WEIGHT)
    return value if weight in (None, "") else (*value, _read_weight(weight))


def convert_labeled_text(value: tuple[Any, ...]) -> dict[str, object]:
    """Return what `read_labeled_text` or `read_text_with_labels` returned as the columns of a row."""
    text, label, *weight = value
    columns: dict[str, object] = {"text": text} if isinstance(text, str) else {"text": text[0], PAIR: text[1]}
    columns |= {"labels": list(label)} if isinstance(label, tuple) else {"label": label}
    return columns | ({WEIGHT: weight[0]} if weight else {})


def _read_weight(value: object) -> float:
    number = parse_number(value)
    if number is None or number <= 0:
        raise RowError(f"{WEIGHT} must be a number above 0; {value!r} was given")
    return number


def _read_label_or_number(name: str, value: object) -> str | int | float:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowError(f"{name} must be a finite number; {value} was given")
        return value
    return _read_label(name, value)


def _read_label(name: str, value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value is not None and not isinstance(value, str):
        raise RowError(f"{name} must be a string or a whole number; {type(value).__name__} was given")
    return read_string(name, value)


def _read_label_set(value: object) -> tuple[str | int, ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # the cell of a table
        try:
            value = json.loads(value)
        except (RecursionError, ValueError):
            raise RowError(f"labels must be a list as JSON writes it; {value!r} was given") from None
    if not isinstance(value, list):
        raise RowError(f"labels must be a list; {type(value).__name__} was given (one label: the column label)")
    labels = tuple(_read_label(f"labels {number}", item) for number, item in enumerate(value, start=1))
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        raise RowError(f"labels has {repeated!r} twice; it lists the labels that apply, not a 0 or 1 for each")
    return labels


# Words


def read_tagged_words(row: Row) -> tuple[Words, WordLabels] | tuple[Words, WordLabels, float]:
    """Return words, the label of each, and the weight of the row if it has one."""
    return _add_weight(row, _read_words(row, "words", "labels"))


def read_ner_tags(row: Row) -> tuple[Words, WordLabels] | tuple[Words, WordLabels, float]:
    """Return the same of words under the names that data sets of named entities use."""
    return _add_weight(row, _read_words(row, "tokens", "ner_tags"))


def convert_tagged_words(value: tuple[Any, ...]) -> dict[str, object]:
    """Return what `read_tagged_words` or `read_ner_tags` returned as the columns of a row."""
    words, labels, *weight = value
    columns: dict[str, object] = {"words": list(words), "labels": list(labels)}
    return columns | ({WEIGHT: weight[0]} if weight else {})


def read_words(row: Row, key: str) -> Words:
    """Return the words in a column."""
    words = read_list(row, key)
    if not words:
        raise RowError(f"{key} is empty", kind=EMPTY)
    return tuple(read_string(f"{key} {number}", item) for number, item in words)


def _read_words(row: Row, words_key: str, labels_key: str) -> tuple[Words, WordLabels]:
    words, labels = read_list(row, words_key), read_list(row, labels_key)
    if len(words) != len(labels):
        raise RowError(f"{len(words)} {words_key} and {len(labels)} {labels_key}; each word has one")
    return (
        read_words(row, words_key),
        tuple(_read_label(f"{labels_key} {number}", item) for number, item in labels),
    )
