"""What is in a file of rows before anything is trained on it: faults, repeats, leaks, lengths, labels."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.data.chat import ChatTemplate
from lora_kit.data.encode import EncodingResult, encode_with_faults
from lora_kit.data.preparation.labels import find_lookalikes, relabel_rows
from lora_kit.data.readers import Fault
from lora_kit.data.rows import Rows, collect_label_names, scan_rows
from lora_kit.models.tasks import LABEL

FIRST_BIN: Final = 16
"""The upper end of the first bin of a histogram of lengths; each next one is twice as far."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are read and rows become tokens: what `scan_rows` and `measure` are given."""

    tokenizer: Any
    max_length: int
    separator: str
    task: str
    rename: Mapping[str, str]
    relabel: Mapping[str, str]
    encoding: str


@dataclass(frozen=True, kw_only=True)
class ExaminedFile:
    """A file of rows, looked at from all sides; nothing has been changed or left out.

    Attributes:
        rows: the rows of its format, those that cannot be trained on because of their length among them.
        faults: all rows that cannot be trained on, sorted by line; those of the kind `long` are also in `rows`.
        unused: columns that are not read.
        duplicates: the line of a row → the line of an earlier row that says exactly the same.
        conflicts: the line of a row → the line of an earlier one with the same input and another label.
        measured: the rows as samples.
        sha256: of what was read.
    """

    rows: Rows
    faults: tuple[Fault, ...]
    unused: tuple[str, ...]
    duplicates: Mapping[int, int]
    conflicts: Mapping[int, int]
    measured: EncodingResult
    sha256: str

    def lines_of(self, kind: str) -> list[int]:
        """Lines of the faults of a kind: `bad`, `empty` or `long`."""
        return [fault.line for fault in self.faults if fault.kind == kind]

    @property
    def total(self) -> int:
        """Everything that stands in the file, be it a row or a fault."""
        return len({*self.rows.lines, *(fault.line for fault in self.faults)})

    @functools.cached_property
    def labels(self) -> dict[str, int]:
        """Texts or words of each label, the most frequent first."""
        return dict(Counter(str(label) for labels in self.rows.labels for label in labels).most_common())

    @functools.cached_property
    def lookalikes(self) -> dict[str, str]:
        """A rare label → the frequent one it is likely to be meant for."""
        return find_lookalikes(self.labels)

    @property
    def learned(self) -> float:
        """The share of tokens with a loss; of rows with labels every row has one, and this is 0."""
        samples = self.measured.encoded
        return samples.num_labels / samples.num_tokens if samples.kind != LABEL and samples.num_tokens else 0.0


def examine(
    path: str | Path,
    reading: ReadOptions,
    *,
    template: ChatTemplate | None = None,
    label2id: Mapping[str, int] | None = None,
    split: str = "train",
) -> ExaminedFile:
    """Look at a file of rows.

    Args:
        label2id: the labels of the training rows, if these are others; labels that are not among them are faults.
        split: of a data set whose name holds none.

    Raises:
        DataError: the file cannot be read as a whole, or holds no rows of one format; see `scan_rows` and `measure`.
    """
    found = scan_rows(path, rename=reading.rename, encoding=reading.encoding, split=split)
    there = {str(label) for labels in found.rows.labels for label in labels}
    # A label that only the training rows have misspelt is no mistake of the validation's.
    relabel = {old: new for old, new in reading.relabel.items() if label2id is None or old in there}
    rows = relabel_rows(found.rows, relabel)
    if rows.values and rows.format in ("label", "words") and label2id is None:
        label2id = {name: number for number, name in enumerate(collect_label_names(rows))}
    measured = encode_with_faults(
        rows,
        reading.tokenizer,
        max_length=reading.max_length,
        separator=reading.separator,
        template=template if rows.format == "chat" else None,
        label2id=label2id,
        task=reading.task,
    )
    return ExaminedFile(
        rows=rows,
        faults=tuple(sorted([*found.faults, *measured.faults])),
        unused=found.unused,
        duplicates=_find_repeats(rows.values, rows.lines),
        conflicts=_find_conflicts(rows),
        measured=measured,
        sha256=found.sha256,
    )


def input_of(rows: Rows, value: Sequence[Any]) -> str:
    """What a model is given of a row, but for case, white space and forms of characters.

    That is the prompt, the text, its words, or what is said before the first answer.
    """
    given: Any = value[0]
    if rows.format == "words":
        given = " ".join(given)
    elif rows.format == "chat":
        first = next(place for place, (role, _) in enumerate(given) if role == "assistant")
        given = "\n".join(content for _, content in given[:first])
    return " ".join(unicodedata.normalize("NFKC", given).casefold().split())


def find_leaks(train: Rows, validation: Rows) -> dict[int, int]:
    """The line of a training row → the line of a validation row with the same input."""
    asked: dict[str, int] = {}
    for line, value in zip(validation.lines, validation.values, strict=True):
        asked.setdefault(input_of(validation, value), line)
    inputs = [(line, input_of(train, value)) for line, value in zip(train.lines, train.values, strict=True)]
    return {line: asked[given] for line, given in inputs if given in asked}


def bin_lengths(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """How many lengths lie in 1–16, 17–32, 33–64, …: (lowest, highest, count), up to the last that is not empty."""
    bins: list[tuple[int, int, int]] = []
    low, high = 1, FIRST_BIN
    while low <= max(lengths, default=0):
        bins.append((low, high, sum(low <= length <= high for length in lengths)))
        low, high = high + 1, high * 2
    return bins


def _find_repeats(values: Sequence[Any], lines: Sequence[int]) -> dict[int, int]:
    first: dict[Any, int] = {}
    repeats = {}
    for line, value in zip(lines, values, strict=True):
        if first.setdefault(value, line) != line:
            repeats[line] = first[value]
    return repeats


def _find_conflicts(rows: Rows) -> dict[int, int]:
    if rows.format != "label":
        return {}
    first: dict[str, tuple[int, str]] = {}
    found = {}
    for line, value in zip(rows.lines, rows.values, strict=True):
        earlier, label = first.setdefault(input_of(rows, value), (line, str(value[1])))
        if label != str(value[1]):
            found[line] = earlier
    return found
