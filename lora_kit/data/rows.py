"""Rows: a file in one training format; every invalid line is reported, and none is dropped silently."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.data.cells import RowError
from lora_kit.data.column_names import suggest_renames
from lora_kit.data.encodings import UTF8
from lora_kit.data.hub_datasets import is_dataset, read_dataset
from lora_kit.data.layouts import LAYOUTS, Layout, RowValue, find_layout, list_columns_that_count, reason_not_ignorable
from lora_kit.data.message_rows import MessageRows
from lora_kit.data.preferences import PREFERENCE_LAYOUTS, find_preference_layout
from lora_kit.data.prompt_rows import LayoutFinder, find_prompt_layout
from lora_kit.data.readers import read_file
from lora_kit.data.records import NOT_UTF8, OTHER_ENCODING_HINT, Fault, Record, Row
from lora_kit.errors import DataError, format_list
from lora_kit.io.given_values import parse_path
from lora_kit.io.text import shorten

logger = logging.getLogger(__name__)

_WHOLE_NUMBER: Final = re.compile(r"0|-?[1-9][0-9]{0,18}")
"""A whole number as it is usually written: `10` and `-1`, not `007`."""
_MAX_SHOWN_FAULTS: Final = 8
"""How many faults one error lists."""
_MAX_NAMED_LINES: Final = 3
"""How many lines it names beyond the first that has a fault."""
_LONGEST_NAME: Final = 60
"""Characters of a column whose renaming is proposed."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file.

    Attributes:
        path: the file, or the name of the data set.
        format: `completion`, `chat`, `label`, `words`, `text`, or one of
            `lora_kit.data.preferences` and `lora_kit.data.prompt_rows`.
        values: one tuple for each row; see `lora_kit.data.layouts`.
        lines: the line each row begins on, from 1; in a JSON array and in a Parquet file the number of the row.
        layout: the name of the layout of the columns; see `lora_kit.data.layouts`.
        parts: the rows of each file, where there are several; then `path` names all of them.
    """

    path: Path
    format: str
    values: tuple[RowValue, ...]
    lines: tuple[int, ...]
    layout: str = ""
    parts: tuple[Rows, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def labels(self) -> tuple[tuple[str | int | float, ...], ...]:
        """The labels of each row: those of a text, or one for each of its words; none in other formats."""
        if self.format not in ("label", "words"):
            return ((),) * len(self.values)
        return tuple(value[1] if isinstance(value[1], tuple) else (value[1],) for value in self.values)

    def only(self, indices: Sequence[int]) -> Rows:
        """Return the rows at these indices, in this order."""
        values = tuple(self.values[index] for index in indices)
        return dataclasses.replace(self, values=values, lines=tuple(self.lines[index] for index in indices), parts=())


@dataclass(frozen=True)
class Scan:
    """A file, scanned: its valid rows, and a fault for each invalid one.

    Attributes:
        rows: the valid rows.
        faults: the invalid rows, sorted by line.
        unused: columns that are not part of the layout.
        sha256: hash of the file, or of the rows of a data set.
        encoding: encoding that the file was read in.
        joined: what became of rows that are messages, and of their roles; None if nothing did.
    """

    rows: Rows
    faults: tuple[Fault, ...]
    unused: tuple[str, ...]
    sha256: str
    encoding: str = UTF8
    joined: MessageRows | None = None


def read_rows(path: str | Path, *, split: str = "train", find: LayoutFinder | None = None) -> Rows:
    """Read the rows of a file or of a data set of the hub.

    `lora_kit.data.readers` lists the kinds of files, `lora_kit.data.hub_datasets` the names of data sets, and
    `lora_kit.data.layouts` the layouts.

    The first row decides the layout. Texts are strings that hold more than white space; labels are strings or whole
    numbers, of one type in a file. Further columns are ignored with a warning. Empty lines are not rows.

    Args:
        split: the split of a data set whose name holds none.
        find: finds the layout; None for `require_layout`.

    Raises:
        DataError: the file is missing or has no row, or lines of it are invalid; the message lists up to eight.
    """
    scan = scan_rows(path, split=split, find=find)
    if scan.faults:
        raise build_fault_error(scan.rows.path, scan.faults)
    warn_of_unused(scan.rows.path, scan.unused)
    return scan.rows


def warn_of_unused(path: Path, keys: Collection[str]) -> None:
    """Log the columns of a file that its layout does not read."""
    if keys:
        logger.warning("%s: keys that are not used: %s", path, format_list(sorted(keys)))


def scan_rows(
    path: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    split: str = "train",
    find: LayoutFinder | None = None,
    join: Callable[[Sequence[Record]], MessageRows] | None = None,
) -> Scan:
    """Read the rows of a file or a data set, and collect the faults of invalid rows instead of raising them.

    Args:
        rename: new names of columns, by old name.
        encoding: the encoding of a text file; `auto` to find it out, see `lora_kit.data.encodings`.
        split: the split of a data set whose name holds none.
        find: finds the layout; None for `require_layout`.
        join: makes conversations of rows that are messages; None where a row is a conversation.

    Raises:
        DataError: the file is missing, cannot be parsed at all, has no row, or is of an unknown layout.
    """
    path = parse_path(path, name="the file of rows")
    contents = read_dataset(path, split=split) if is_dataset(path) else read_file(path, encoding=encoding)
    if not contents.records and not contents.faults:
        raise build_empty_error(path)
    if not contents.records:
        return Scan(Rows(path, "", (), ()), tuple(contents.faults), (), contents.sha256, contents.encoding)
    records = rename_columns(path, contents.records, rename or {})
    joined = MessageRows(records=records) if join is None else join(records)
    known_faults = [*contents.faults, *joined.faults]
    if not joined.records:
        return Scan(Rows(path, "", (), ()), tuple(sorted(known_faults)), (), contents.sha256, contents.encoding)
    records = joined.records
    layout = (find or require_layout)(path, records[0][1])
    columns = {key for _, row in records for key in row}
    unused = set[str]() if layout.reads_all else columns - {*layout.keys, *layout.optional}
    refuse_ignored_columns(path, layout, records)
    rows, faults = convert_records(path, layout, records)
    all_faults = tuple(sorted([*known_faults, *faults]))
    all_unused = tuple(sorted({*unused, *joined.unused}))
    return Scan(rows, all_faults, all_unused, contents.sha256, contents.encoding, joined)


def convert_records(path: Path, layout: Layout, records: Sequence[Record]) -> tuple[Rows, list[Fault]]:
    """Return the rows that match the layout, and a fault for each that does not."""
    values: list[RowValue] = []
    lines: list[int] = []
    faults: list[Fault] = []
    for line, row in records:
        try:
            values.append(layout.convert(row))
        except RowError as error:
            faults.append(Fault(line, str(error), error.kind))
        else:
            lines.append(line)
    rows = Rows(path, layout.format, tuple(values), tuple(lines), layout.name)
    mixed = [*_find_mixed_labels(rows), *_find_mixed_pairs(rows)]
    invalid = {fault.line for fault in mixed}
    return rows.only([index for index, line in enumerate(lines) if line not in invalid]), [*faults, *mixed]


def build_empty_error(path: Path) -> DataError:
    """Return the error for a file without rows."""
    return DataError(f"{path} has no rows", hint="the ending of its name decides how a file is read")


def build_fault_error(path: Path, faults: Sequence[Fault], *, hint: str = "") -> DataError:
    """Return an error that lists the first invalid lines; of several with one fault the first and their number."""
    alike: dict[str, list[int]] = {}
    for fault in faults:
        alike.setdefault(fault.what, []).append(fault.line)
    shown = list(alike.items())[:_MAX_SHOWN_FAULTS]
    lines = [f"{path}:{own[0]}: {what}{_count_further(own)}" for what, own in shown]
    left = len(faults) - sum(len(own) for _, own in shown)
    if left:
        lines.append(f"and {left:,} more {'line' if left == 1 else 'lines'}")
    if len(lines) > 1:
        lines.insert(0, f"{len(faults):,} lines are not rows that can be used:")
    if any(fault.what.startswith(NOT_UTF8) for fault in faults):
        hint = f"{OTHER_ENCODING_HINT}; {hint}" if hint else OTHER_ENCODING_HINT
    return DataError("\n".join(lines), hint=hint)


def _count_further(lines: Sequence[int]) -> str:
    """Return how many lines beyond the first have the same fault, with the first of them."""
    further = lines[1:]
    if not further:
        return ""
    named = ", ".join(map(str, further[:_MAX_NAMED_LINES]))
    more = f" and {len(further) - _MAX_NAMED_LINES:,} more" if len(further) > _MAX_NAMED_LINES else ""
    return f" (so {'is line' if len(further) == 1 else 'are lines'} {named}{more})"


def collect_label_names(rows: Rows) -> tuple[str, ...]:
    """Return the names of the labels in a file, sorted (numbers by size); the index of a name is its class.

    Raises:
        DataError: there are fewer than two.
    """
    names = tuple(sort_labels({str(label) for labels in rows.labels for label in labels}))
    if len(names) < 2:
        raise DataError(f"{rows.path}: every label is {names[0]!r}", hint="a classifier needs at least two labels")
    return names


def sort_labels(names: Collection[str]) -> list[str]:
    """Return labels sorted: by size if all are whole numbers, as a CSV file writes them too, else by name."""
    return sorted(names, key=int if all(map(_WHOLE_NUMBER.fullmatch, names)) else None)


def rename_columns(path: Path, records: Sequence[Record], names: Mapping[str, str]) -> Sequence[Record]:
    """Return the records with other names of columns, by old name.

    An empty name takes a column, or a key of messages, out.

    Raises:
        DataError: a column is not there, or two would have one name.
    """
    if not names:
        return records
    removed = {old for old, new in names.items() if not new}
    if removed:
        records = _remove_keys(path, records, removed)
        names = {old: new for old, new in names.items() if new}
    known = {key for _, row in records for key in row}
    absent = sorted(set(names) - known)
    if absent:
        raise DataError(f"{path} has no {format_list(absent)} to rename", hint=f"it has {format_list(sorted(known))}")
    taken = sorted(new for new in names.values() if new in known - set(names))
    repeated = sorted({new for new in names.values() if list(names.values()).count(new) > 1})
    if taken or repeated:
        raise DataError(f"{path}: two columns would have the name {format_list(taken or repeated)}")
    return [(line, {names.get(key, key): value for key, value in row.items()}) for line, row in records]


def _remove_keys(path: Path, records: Sequence[Record], removed: Collection[str]) -> Sequence[Record]:
    """Return the records without some columns, or, where no column has that name, without that key of messages."""
    columns = {key for _, row in records for key in row}
    keys = {key for _, row in records for value in row.values() for item in _list_messages(value) for key in item}
    absent = sorted(set(removed) - columns - keys)
    if absent:
        hint = f"it has {format_list(sorted(columns))}"
        raise DataError(f"{path} has no {format_list(absent)} to take out", hint=hint)
    gone = set(removed) - columns

    def clean(value: object) -> object:
        if not _list_messages(value):
            return value
        items = value if isinstance(value, list) else []
        return [{k: v for k, v in item.items() if k not in gone} if isinstance(item, dict) else item for item in items]

    return [(line, {key: clean(value) for key, value in row.items() if key not in removed}) for line, row in records]


def _list_messages(value: object) -> list[dict[str, object]]:
    """Return the messages in a cell; empty where it holds something else."""
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, dict) and ("role" in item or "from" in item)]


def require_layout(path: Path, row: Row) -> Layout:
    """Return the layout of the first row of a file.

    Raises:
        DataError: there is none with its columns.
    """
    layout = find_preference_layout(row) or find_layout(row) or find_prompt_layout(row)
    if layout is None:
        formats = "; ".join(dict.fromkeys(" and ".join(layout.keys) for layout in (*LAYOUTS, *PREFERENCE_LAYOUTS)))
        other = f"formats: {formats}. lora-kit prepare --rename mine=prompt gives columns other names"
        what = f"{path}: the first row has the keys {shorten(format_list(sorted(row)), most=60)}"
        is_plain = all(name.isprintable() and len(name) <= _LONGEST_NAME for name in row)
        command = suggest_renames(path, row) if is_plain else None
        raise DataError(what, hint=command or other)
    return layout


def refuse_ignored_columns(path: Path, layout: Layout, records: Sequence[Record]) -> None:
    """Raise DataError for columns with values that the layout does not read, though they say what is learned."""
    counting = {key for _, row in records for key in list_columns_that_count(layout, row)}
    reason = reason_not_ignorable(layout, counting)
    if reason:
        hint = "take them out, or give columns other names: lora-kit prepare --rename label=topic"
        raise DataError(f"{path}: {reason}", hint=hint)


def _find_mixed_labels(rows: Rows) -> list[Fault]:
    """Return a fault for each row with a label of another type than the first; whole and other numbers are one type."""
    types = {type(label) for labels in rows.labels for label in labels}
    if types <= {int, float}:
        return []
    expected = next(type(label) for labels in rows.labels for label in labels)
    return [
        Fault(line, f"label is {type(other).__name__}, and {expected.__name__} in the first row")
        for labels, line in zip(rows.labels, rows.lines, strict=True)
        for other in [label for label in labels if type(label) is not expected][:1]
    ]


def _find_mixed_pairs(rows: Rows) -> list[Fault]:
    """Return a fault for each text without a second one where the first row has one, or the reverse."""
    if rows.format != "label" or not rows.values:
        return []
    is_pair = isinstance(rows.values[0][0], tuple)
    message = "text_pair is missing; the first row has it" if is_pair else "text_pair is given; the first row has none"
    lines = zip(rows.lines, rows.values, strict=True)
    return [Fault(line, message) for line, value in lines if isinstance(value[0], tuple) != is_pair]
