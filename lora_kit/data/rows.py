"""Files as rows: the layout is found, every wrong line is named, and nothing is left out in silence."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.data.hub_datasets import is_dataset, read_dataset
from lora_kit.data.layouts import LAYOUTS, Layout, RowError, layout_of
from lora_kit.data.readers import NOT_UTF8, OTHER_ENCODING, Fault, Record, read_file
from lora_kit.errors import DataError, format_list

logger = logging.getLogger(__name__)

_MAX_SHOWN_FAULTS: Final = 8
"""Wrong lines told in one error."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file.

    Attributes:
        path: the file, or the name of the data set.
        format: `completion`, `chat`, `label`, `words` or `text`.
        values: one tuple per row; see `lora_kit.data.layouts`.
        lines: the line each row begins on, from 1; in a JSON array and in a Parquet file its number.
        layout: what the columns are called together; see there too.
    """

    path: Path
    format: str
    values: tuple[tuple[Any, ...], ...]
    lines: tuple[int, ...]
    layout: str = ""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def labels(self) -> tuple[tuple[str | int, ...], ...]:
        """The labels of each row: one of a text, one for each of its words; none in other formats."""
        if self.format == "words":
            return tuple(value[1] for value in self.values)
        return tuple((value[1],) if self.format == "label" else () for value in self.values)

    def only(self, chosen: Sequence[int]) -> Rows:
        """The rows at these places, in this order."""
        values = tuple(self.values[place] for place in chosen)
        return dataclasses.replace(self, values=values, lines=tuple(self.lines[place] for place in chosen))


@dataclass(frozen=True)
class Scan:
    """All of a file: the rows that are good, and a fault for each that is not.

    Attributes:
        unused: keys that no row was read by.
        sha256: of what was read.
    """

    rows: Rows
    faults: tuple[Fault, ...]
    unused: tuple[str, ...]
    sha256: str


def read_rows(path: str | Path, *, split: str = "train") -> Rows:
    """The rows of a file or a data set of the hub.

    The kinds of files are listed in `lora_kit.data.readers`, names of data sets in `lora_kit.data.hub_datasets`, and
    layouts in    `lora_kit.data.layouts`.

    The first row decides the layout. Texts are strings with something other than white space in them; labels are
    strings or whole numbers, of one kind in a file. Further keys are ignored, and that is logged. Empty lines are no
    rows.

    Args:
        split: of a data set whose name holds none.

    Raises:
        DataError: the file is missing or has no row, or lines of it are wrong; names up to eight of them.
    """
    found = scan_rows(path, split=split)
    if found.faults:
        raise build_fault_error(found.rows.path, found.faults)
    if found.unused:
        logger.warning("%s: keys that are not used: %s", found.rows.path, format_list(found.unused))
    return found.rows


def scan_rows(
    path: str | Path, *, rename: Mapping[str, str] | None = None, encoding: str = "utf-8", split: str = "train"
) -> Scan:
    """The rows of a file or a data set and its faults, none of which is an error here.

    Args:
        rename: columns to the names they are to go by.
        encoding: of a file of text.
        split: of a data set whose name holds none.

    Raises:
        DataError: the file is missing, cannot be read as a whole, has no row, or is of no known layout.
    """
    path = Path(path)
    found = read_dataset(path, split=split) if is_dataset(path) else read_file(path, encoding=encoding)
    records, faults = found.records, list(found.faults)
    if not records and not faults:
        raise DataError(f"{path} has no rows", hint="a kind of file is known by the ending of its name")
    if not records:
        return Scan(Rows(path, "", (), ()), tuple(faults), (), found.sha256)
    records = _rename_columns(path, records, rename or {})
    layout = _find_layout(path, records[0][1])
    values, lines = [], []
    for line, row in records:
        try:
            values.append(layout.value(row))
        except RowError as error:
            faults.append(Fault(line, str(error), error.kind))
        else:
            lines.append(line)
    rows = Rows(path, layout.format, tuple(values), tuple(lines), layout.name)
    faults += _find_mixed_labels(rows)
    wrong = {fault.line for fault in faults}
    rows = rows.only([place for place, line in enumerate(lines) if line not in wrong])
    used = {*layout.keys, *layout.optional}
    unused = {key for _, row in records for key in row} - used
    return Scan(rows, tuple(sorted(faults)), tuple(sorted(unused)), found.sha256)


def build_fault_error(path: Path, faults: Sequence[Fault], *, hint: str = "") -> DataError:
    """An error that names the first of the lines that are wrong."""
    told = [f"{path}:{fault.line}: {fault.what}" for fault in faults[:_MAX_SHOWN_FAULTS]]
    more = f"\nand {len(faults) - _MAX_SHOWN_FAULTS} more lines" if len(faults) > _MAX_SHOWN_FAULTS else ""
    if any(fault.what.startswith(NOT_UTF8) for fault in faults):
        hint = f"{OTHER_ENCODING}; {hint}" if hint else OTHER_ENCODING
    return DataError("\n".join(told) + more, hint=hint)


def collect_label_names(rows: Rows) -> tuple[str, ...]:
    """The names of the labels in a file, sorted (numbers by size); the place of a name is its number.

    Raises:
        DataError: there are fewer than two.
    """
    names = tuple(str(label) for label in sorted({label for found in rows.labels for label in found}))
    if len(names) < 2:
        raise DataError(f"{rows.path}: every label is {names[0]!r}", hint="a classifier needs two labels at least")
    return names


def _rename_columns(path: Path, records: Sequence[Record], names: Mapping[str, str]) -> Sequence[Record]:
    if not names:
        return records
    known = {key for _, row in records for key in row}
    absent = sorted(set(names) - known)
    if absent:
        raise DataError(f"{path} has no {format_list(absent)} to rename", hint=f"it has {format_list(sorted(known))}")
    taken = sorted(new for new in names.values() if new in known - set(names))
    twice = sorted({new for new in names.values() if list(names.values()).count(new) > 1})
    if taken or twice:
        raise DataError(f"{path}: {format_list(taken or twice)} would stand there twice after renaming")
    return [(line, {names.get(key, key): value for key, value in row.items()}) for line, row in records]


def _find_layout(path: Path, row: Mapping[str, Any]) -> Layout:
    layout = layout_of(list(row))
    if layout is None:
        formats = "; ".join(" and ".join(layout.keys) for layout in LAYOUTS)
        hint = f"formats: {formats}. lora-kit prepare --rename mine=prompt gives columns other names"
        raise DataError(f"{path}: the first row has the keys {format_list(sorted(row))}", hint=hint)
    return layout


def _find_mixed_labels(rows: Rows) -> list[Fault]:
    kind = next((type(label) for labels in rows.labels for label in labels), str)
    return [
        Fault(line, f"label is {type(other).__name__}, and {kind.__name__} in the first row")
        for labels, line in zip(rows.labels, rows.lines, strict=True)
        for other in [label for label in labels if type(label) is not kind][:1]
    ]
