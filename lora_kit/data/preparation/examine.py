"""Examine a file of rows before anything is trained on it: faults, repeats, leaks, lengths, labels."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.data.encode import EncodingResult, encode_with_faults
from lora_kit.data.encodings import UTF8
from lora_kit.data.label_problem import list_label_names, resolve_problem
from lora_kit.data.layouts import RowValue
from lora_kit.data.message_rows import join_message_rows
from lora_kit.data.preferences import get_answer_format, get_first_answer
from lora_kit.data.preparation.labels import (
    choose_spellings,
    find_lookalikes,
    find_rare_labels,
    find_variants,
    relabel_rows,
)
from lora_kit.data.prompt_rows import require_prompt_layout
from lora_kit.data.records import Fault
from lora_kit.data.rows import Rows, scan_rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.models.protocols import Tokenizer
from lora_kit.models.tasks import REGRESSION, SINGLE_LABEL, TEXT_KINDS

FIRST_BIN: Final = 16
"""Upper end of the first bin of a histogram of lengths; that of each further bin is twice the one before."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are read, and how their rows become tokens.

    Attributes:
        base: name of the base.
        tokenizer: tokenizer of the base.
        hidden_size: width of the base; None where its config does not say it.
        chat_template: the template of conversations, as a recipe names it; None for the tokenizer's own.
        sample_format: the format of samples; labels are added from the file.
        rename: new names of columns, by old name.
        relabel: new names of labels, by old name; or `AUTO`.
        encoding: encoding of the files; `auto` to find it out.
        problem: what is predicted of texts with labels; None to infer it from the labels.
        rewards: functions that reward answers of the model's own, for rows of prompts; empty for rows with answers.
    """

    base: str
    tokenizer: Tokenizer
    hidden_size: int | None
    chat_template: str | None
    sample_format: SampleFormat
    rename: Mapping[str, str]
    relabel: Mapping[str, str] | str
    encoding: str
    problem: str | None = None
    rewards: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExaminedFile:
    """A file of rows and what is wrong with it; nothing has been left out.

    Attributes:
        rows: the rows that match the format, including those that are too long to be trained on.
        faults: all rows that cannot be trained on, sorted by line; those of the kind `long` are also in `rows`.
        unused: columns that are not part of the layout.
        duplicates: the line of a row → the line of an earlier, identical row.
        conflicts: of an input with more than one label, the line of each later row → the line of its first row.
        relabeled: new names that labels got, by old name.
        measured: the rows as samples.
        sha256: hash of the file, or of the rows of a data set.
        encoding: encoding that the file was read in.
        problem: what the labels of texts are; None in other formats.
        joined_by: the column by which rows of one message each were joined to conversations; empty for other rows.
        roles: what names of roles that people use became, by name.
    """

    rows: Rows
    faults: tuple[Fault, ...]
    unused: tuple[str, ...]
    duplicates: Mapping[int, int]
    conflicts: Mapping[int, int]
    relabeled: Mapping[str, str]
    measured: EncodingResult
    sha256: str
    encoding: str = UTF8
    problem: str | None = None
    joined_by: str = ""
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def lines_of(self, kind: str) -> list[int]:
        """Return the lines of the faults of a kind: `bad`, `empty` or `long`."""
        return [fault.line for fault in self.faults if fault.kind == kind]

    @property
    def total(self) -> int:
        """Number of rows in the file, whether they are valid or not."""
        return len({*self.rows.lines, *(fault.line for fault in self.faults)})

    @functools.cached_property
    def labels(self) -> dict[str, int]:
        """How many texts or words have each label, the most frequent label first; empty for numbers to be predicted."""
        return {} if self.problem == REGRESSION else _count_labels(self.rows)

    @functools.cached_property
    def variants(self) -> dict[str, str]:
        """A label → the more frequent label that differs from it only in case, blanks or umlauts."""
        return find_variants(self.labels)

    @functools.cached_property
    def lookalikes(self) -> dict[str, str]:
        """A rare label → the frequent label that it is probably a misspelling of."""
        return find_lookalikes(self.labels)

    @property
    def rare_labels(self) -> dict[str, int]:
        """The labels that have too few texts or words to be learned, with how many these are."""
        return find_rare_labels(self.labels)

    def find_lines_of_labels(self, labels: Collection[str]) -> list[int]:
        """Return the lines of the texts that have one of these labels."""
        if self.rows.format != "label":
            return []
        rows = zip(self.rows.lines, self.rows.labels, strict=True)
        return [line for line, own in rows if not set(labels).isdisjoint(map(str, own))]

    @property
    def learned(self) -> float:
        """Share of tokens with a loss; 0 if something is predicted of each text, for then no token has a loss."""
        samples = self.measured.encoded
        return samples.num_labels / samples.num_tokens if samples.kind not in TEXT_KINDS and samples.num_tokens else 0.0


def examine(
    path: str | Path, options: ReadOptions, *, label2id: Mapping[str, int] | None = None, split: str = "train"
) -> ExaminedFile:
    """Examine a file of rows.

    Args:
        label2id: labels of the training rows, for another file; labels that are not among them are faults. None to take
            the labels of this file.
        split: the split of a data set whose name holds none.

    Raises:
        DataError: the file cannot be parsed at all, or its rows cannot be encoded; see `scan_rows` and
            `encode_with_faults`.
    """
    find = require_prompt_layout if options.rewards else None
    scan = scan_rows(
        path, rename=options.rename, encoding=options.encoding, split=split, find=find, join=join_message_rows
    )
    relabel = _choose_names(scan.rows, options.relabel, label2id)
    rows = relabel_rows(scan.rows, relabel)
    problem = resolve_problem(rows, options.problem) if rows.values and rows.format == "label" else None
    if rows.values and rows.format in ("label", "words") and label2id is None:
        names = list_label_names(rows, problem or SINGLE_LABEL)
        label2id = {name: number for number, name in enumerate(names)}
    sample_format = dataclasses.replace(options.sample_format, label2id=label2id or {}, problem=problem or SINGLE_LABEL)
    measured = encode_with_faults(rows, options.tokenizer, sample_format)
    return ExaminedFile(
        rows=rows,
        faults=tuple(sorted([*scan.faults, *measured.faults])),
        unused=scan.unused,
        duplicates=_find_duplicates(rows),
        conflicts=_find_conflicts(rows),
        relabeled=relabel,
        measured=measured,
        sha256=scan.sha256,
        encoding=scan.encoding,
        problem=problem,
        joined_by="" if scan.joined is None else scan.joined.joined_by,
        roles={} if scan.joined is None else scan.joined.roles,
    )


def _choose_names(rows: Rows, relabel: Mapping[str, str] | str, label2id: Mapping[str, int] | None) -> dict[str, str]:
    """Return the new names of the labels in a file, by old name."""
    counts = _count_labels(rows)
    if isinstance(relabel, str):
        return choose_spellings(counts, known=label2id or ())
    # A label that is misspelled in the training rows only need not be in the validation rows.
    return {old: new for old, new in relabel.items() if label2id is None or old in counts}


def _count_labels(rows: Rows) -> dict[str, int]:
    """Return how often each label occurs, the most frequent first."""
    return dict(Counter(str(label) for labels in rows.labels for label in labels).most_common())


def normalize_input(rows: Rows, value: RowValue) -> str:
    """Return the input of a row, ignoring case, white space and Unicode forms.

    The input is the prompt, the text, its words, or everything before the last answer.
    """
    value = get_first_answer(rows.format, value)
    if rows.format == "words":
        text = " ".join(value[0])
    elif rows.format == "chat-prompt":
        text = "\n".join(message.content for message in value[0].messages)
    elif get_answer_format(rows.format) == "chat":
        text = value[0].input_text
    else:
        text = value[0] if isinstance(value[0], str) else "\n".join(value[0])
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_leaks(train: Rows, validation: Rows) -> dict[int, int]:
    """Return the line of each training row whose input is validated on → the line of that validation row."""
    validated: dict[str, int] = {}
    for line, value in zip(validation.lines, validation.values, strict=True):
        validated.setdefault(normalize_input(validation, value), line)
    inputs = [(line, normalize_input(train, value)) for line, value in zip(train.lines, train.values, strict=True)]
    return {line: validated[text] for line, text in inputs if text in validated}


def bin_lengths(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Count lengths in 1–16, 17–32, 33–64, …: (lowest, highest, count), up to the last bin that is not empty."""
    bins: list[tuple[int, int, int]] = []
    low, high = 1, FIRST_BIN
    while low <= max(lengths, default=0):
        bins.append((low, high, sum(low <= length <= high for length in lengths)))
        low, high = high + 1, high * 2
    return bins


def _find_duplicates(rows: Rows) -> dict[int, int]:
    first: dict[RowValue, int] = {}
    duplicates = {}
    for line, value in zip(rows.lines, rows.values, strict=True):
        if first.setdefault(value, line) != line:
            duplicates[line] = first[value]
    return duplicates


def _find_conflicts(rows: Rows) -> dict[int, int]:
    if rows.format != "label":
        return {}
    lines, labels = defaultdict[str, list[int]](list), defaultdict[str, set[str]](set)
    for line, value in zip(rows.lines, rows.values, strict=True):
        text = normalize_input(rows, value)
        lines[text].append(line)
        labels[text].add(str(sorted(map(str, value[1])) if isinstance(value[1], tuple) else value[1]))
    return {line: lines[text][0] for text, found in labels.items() if len(found) > 1 for line in lines[text][1:]}
