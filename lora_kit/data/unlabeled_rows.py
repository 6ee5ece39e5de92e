"""Rows to predict on: texts, pairs of texts or words, with labels or without."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from lora_kit.data.cells import RowError
from lora_kit.data.column_names import find_text_column
from lora_kit.data.encodings import AUTO_ENCODING
from lora_kit.data.hub_datasets import is_dataset, read_dataset
from lora_kit.data.label_columns import PAIR, read_text_input, read_words
from lora_kit.data.readers import GZIP, READABLE_SUFFIXES, read_file
from lora_kit.data.records import EMPTY, Fault, Row
from lora_kit.data.rows import build_fault_error, rename_columns
from lora_kit.errors import DataError, format_list
from lora_kit.io.text import shorten
from lora_kit.models.tasks import TOKENS

_WORD_COLUMNS = ("words", "tokens")
ID: Final = "id"
"""The column with what people call a row: it is written beside what is predicted."""
PAIR_OF_WORDS: Final = f"{PAIR} is for task classify; words are found in one text"
"""The message where task `tokens` is given a second text."""


@dataclass(frozen=True)
class UnlabeledRows:
    """The inputs of a file.

    Attributes:
        lines: the line each row begins on, from 1; in a JSON array and in a Parquet file the number of the row.
        inputs: the texts, pairs of texts, or words.
        ids: what each row is called in its column `id`; empty without one.
        left_out: the lines of rows without an input.
    """

    lines: tuple[int, ...]
    inputs: tuple[str | tuple[str, ...], ...]
    ids: tuple[object, ...] = ()
    left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def name_rows(self) -> list[dict[str, object]]:
        """Return what each row is called: its line, and its id where the file has ids."""
        named = zip(self.lines, self.ids, strict=True) if self.ids else ()
        return [{"line": line, ID: id} for line, id in named] or [{"line": line} for line in self.lines]


def read_unlabeled_rows(
    path: str | Path, task: str, *, rename: Mapping[str, str] | None = None, drop_empty: bool = False
) -> UnlabeledRows:
    """Read the inputs of a file or of a data set of the hub; of other columns `id` is kept.

    A text file may be in an encoding that is found out, see `lora_kit.data.encodings`.

    Args:
        task: `classify` takes `text` and perhaps `text_pair`; `tokens` takes `words`, `tokens` or `text`.
        rename: new names of columns, by old name.
        drop_empty: whether rows without an input are left out.

    Raises:
        DataError: the file cannot be read, has no row, or has rows without an input; the message lists their lines.
    """
    path = Path(path)
    contents = read_dataset(path, split="train") if is_dataset(path) else read_file(path, encoding=AUTO_ENCODING)
    records = rename_columns(path, contents.records, rename or {})
    faults = list(contents.faults)
    if records:
        _require_input(path, records[0][1], task)
    found: list[tuple[int, str | tuple[str, ...], object]] = []
    for line, row in records:
        try:
            found.append((line, _read_input(row, task), row.get(ID)))
        except RowError as error:
            faults.append(Fault(line, str(error), error.kind))
    left_out = tuple(fault.line for fault in faults if drop_empty and fault.kind == EMPTY)
    faults = [fault for fault in faults if fault.line not in left_out]
    if faults:
        hint = "--drop empty leaves these rows out" if {fault.kind for fault in faults} == {EMPTY} else ""
        raise build_fault_error(path, sorted(faults), hint=hint)
    if not found:
        raise DataError(f"{path} has no rows", hint="the ending of its name decides how a file is read")
    lines, inputs, ids = zip(*found, strict=True)
    _check_one_form(path, lines, inputs)
    return UnlabeledRows(lines, inputs, ids if any(ID in row for _, row in records) else (), left_out)


def _require_input(path: Path, row: Row, task: str) -> None:
    """Raise DataError for a file whose columns have other names than those that are read."""
    if "text" in row or (task == TOKENS and any(name in row for name in _WORD_COLUMNS)):
        return
    expected = "words, tokens or text" if task == TOKENS else "text"
    text = find_text_column(row)
    hint = f"--rename {shlex.quote(f'{text}=text')}" if text else "--rename Message=text, if that is its name"
    raise DataError(f"{path} has no column {expected}; it has {shorten(format_list(sorted(row)), most=60)}", hint=hint)


def read_unlabeled_lines(stream: IO[bytes]) -> list[str]:
    """Read texts from a stream, one on each line; lines of white space hold none.

    Raises:
        DataError: the stream is not UTF-8, or has no text.
    """
    try:
        lines = [line.removesuffix("\r") for line in stream.read().decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error.reason} at byte {error.start:,}") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise DataError("standard input has no text", hint="give a text, or a line for each text")
    return texts


def reason_likely_a_file(text: str) -> str | None:
    """Return why a text is likely meant as a file of rows; None where it is not."""
    name = text.strip()
    is_named_so = (
        "\n" not in name and Path(name).name.lower().endswith((*READABLE_SUFFIXES, GZIP)) and os.path.isfile(name)
    )
    return f"{name} is a file; texts are expected" if is_named_so else None


def _read_input(row: Row, task: str) -> str | tuple[str, ...]:
    if task == TOKENS:
        column = next((name for name in _WORD_COLUMNS if row.get(name) is not None), None)
        if column is not None:
            return read_words(row, column)
        if row.get(PAIR) is not None:
            raise RowError(PAIR_OF_WORDS)
    if "text" not in row:
        expected = "words, tokens or text" if task == TOKENS else "text"
        raise RowError(f"{expected} is expected; the row has {format_list(sorted(map(str, row)))}")
    return read_text_input(row)


def _check_one_form(path: Path, lines: Sequence[int], inputs: Sequence[str | tuple[str, ...]]) -> None:
    """Raise DataError where some rows have a text and others have two, or words."""
    form = isinstance(inputs[0], str)
    faults = [
        Fault(line, "its columns are not those of the first row")
        for line, each in zip(lines, inputs, strict=True)
        if isinstance(each, str) != form
    ]
    if faults:
        raise build_fault_error(path, faults)
