"""Columns with labels: of a text, or of each of its words."""

from __future__ import annotations

from lora_kit.data.cells import RowError, read_list, read_string
from lora_kit.data.records import EMPTY, Row


def read_labeled_text(row: Row) -> tuple[str, str | int]:
    return read_string("text", row["text"]), _read_label("label", row["label"])


def _read_label(name: str, value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if value is not None and not isinstance(value, str):
        raise RowError(f"{name} must be a string or a whole number; {type(value).__name__} was given")
    return read_string(name, value)


def _read_words(row: Row, words_key: str, labels_key: str) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    words, labels = read_list(row, words_key), read_list(row, labels_key)
    if len(words) != len(labels):
        raise RowError(f"{len(words)} {words_key} and {len(labels)} {labels_key}; each word has one")
    if not words:
        raise RowError(f"{words_key} is empty", kind=EMPTY)
    return (
        tuple(read_string(f"{words_key} {number}", item) for number, item in words),
        tuple(_read_label(f"{labels_key} {number}", item) for number, item in labels),
    )


def read_tagged_words(row: Row) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    return _read_words(row, "words", "labels")


def read_ner_tags(row: Row) -> tuple[tuple[str, ...], tuple[str | int, ...]]:
    return _read_words(row, "tokens", "ner_tags")
