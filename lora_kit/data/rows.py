"""JSONL files as rows: the format is found, every wrong line is named, and nothing is left out in silence."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import DataError, listed, nearest

logger = logging.getLogger(__name__)

FORMATS: Final[Mapping[str, tuple[str, ...]]] = {
    "completion": ("prompt", "completion"),
    "label": ("text", "label"),
    "text": ("text",),
}
"""Formats by their keys; the first one all of whose keys the first row has is the format of the file."""
_SHOWN: Final = 8
"""Wrong lines told in one error."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file.

    Attributes:
        path: the file.
        format: `completion`, `label` or `text`.
        values: one tuple per row, in the order of the format's keys.
        lines: the line each row stands on, from 1.
    """

    path: Path
    format: str
    values: tuple[tuple[Any, ...], ...]
    lines: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.values)


def read_rows(path: str | Path) -> Rows:
    """The rows of a JSONL file: `{"prompt", "completion"}`, `{"text", "label"}` or `{"text"}` on each line.

    Texts are strings with something other than white space in them; labels are strings or whole numbers, of one kind
    in a file. Further keys are ignored, and that is logged. Empty lines are no rows.

    Raises:
        DataError: the file is missing or has no row, or lines of it are wrong; names up to eight of them.
    """
    path = Path(path)
    parsed, faults = _parsed(_contents(path))
    if not parsed and not faults:
        raise DataError(f"{path} has no rows", hint="one JSON object on each line")
    format_ = _format_of(path, parsed[0][1]) if parsed else ""
    keys = FORMATS.get(format_, ())
    values, lines = [], []
    for line, row in parsed:
        fault = _fault(row, keys)
        if fault:
            faults.append((line, fault))
        else:
            values.append(tuple(row[key] for key in keys))
            lines.append(line)
    if format_ == "label" and not faults:
        faults += _mixed_labels(values, lines)
    if faults:
        told = [f"{path}:{line}: {fault}" for line, fault in sorted(faults)[:_SHOWN]]
        more = f"\nand {len(faults) - _SHOWN} more lines" if len(faults) > _SHOWN else ""
        raise DataError("\n".join(told) + more)
    extra = sorted({key for _, row in parsed for key in row} - set(keys))
    if extra:
        logger.warning("%s: keys that are not used: %s", path, listed(extra))
    return Rows(path, format_, tuple(values), tuple(lines))


def label_names(rows: Rows) -> tuple[str, ...]:
    """The names of the labels in a file, sorted (numbers by size); the place of a name is its number.

    Raises:
        DataError: there are fewer than two.
    """
    names = tuple(str(label) for label in sorted({value[1] for value in rows.values}))
    if len(names) < 2:
        raise DataError(f"{rows.path}: every label is {names[0]!r}", hint="a classifier needs two labels at least")
    return names


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        here = [str(path.parent / item.name) for item in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(str(path), here) or "paths count from the working directory"
        raise DataError(f"{path}: no such file", hint=hint) from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder", hint="give one JSONL file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _parsed(contents: bytes) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, str]]]:
    """(line, object) of the lines that are objects, and (line, fault) of those that are not."""
    rows, faults = [], []
    for number, line in enumerate(contents.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=_no_repeats)
        except UnicodeDecodeError as error:
            faults.append((number, f"not UTF-8 at byte {error.start} of the line"))
        except json.JSONDecodeError as error:
            faults.append((number, f"not JSON: {error.msg} at column {error.colno}"))
        except (RecursionError, ValueError) as error:
            faults.append((number, str(error) if isinstance(error, _RepeatedKeyError) else "not JSON that can be read"))
        else:
            if isinstance(row, dict):
                rows.append((number, row))
            else:
                faults.append((number, f"a JSON object was expected, found {type(row).__name__}"))
    return rows, faults


class _RepeatedKeyError(ValueError):
    pass


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return found


def _format_of(path: Path, row: Mapping[str, Any]) -> str:
    for name, keys in FORMATS.items():
        if all(key in row for key in keys):
            return name
    formats = "; ".join(" and ".join(keys) for keys in FORMATS.values())
    raise DataError(f"{path}: the first row has the keys {listed(sorted(row))}", hint=f"formats: {formats}")


def _fault(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What is wrong with a row, or an empty string."""
    missing = [key for key in keys if key not in row]
    if missing:
        return f"{listed(missing)} missing; the first row has it"
    for key in keys:
        value = row[key]
        if key == "label" and isinstance(value, int) and not isinstance(value, bool):
            continue
        if not isinstance(value, str):
            expected = "a string or a whole number" if key == "label" else "a string"
            return f"{key} must be {expected}; {type(value).__name__} was given"
        if not value.strip():
            return f"{key} is empty"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return f"{key} holds half a surrogate pair, which is not text"
    return ""


def _mixed_labels(values: Sequence[tuple[Any, ...]], lines: Sequence[int]) -> list[tuple[int, str]]:
    kind = type(values[0][1])
    return [
        (line, f"label is {type(value[1]).__name__}, and {kind.__name__} in the first row")
        for value, line in zip(values, lines, strict=True)
        if type(value[1]) is not kind
    ]
