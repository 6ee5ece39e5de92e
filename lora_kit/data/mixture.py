"""Several files as one: how often the rows of each are taken is its weight, and the seed chooses.

A file of n rows with the weight w is taken ⌊w⌋ times whole, and round((w - ⌊w⌋) · n) of its rows once more; at least
one row is taken. Which rows these are follows from the seed and the place of the file in the list, not from its name.
They are the same in every epoch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from lora_kit.data.prompt_rows import LayoutFinder
from lora_kit.data.rows import Rows, read_rows
from lora_kit.errors import DataError

MAX_WEIGHT: Final = 1000
"""The largest weight of a file: a larger one is rather a slip than a wish."""


@dataclass(frozen=True)
class DataFile:
    """One of several files of rows.

    Attributes:
        path: the file, or the name of a data set.
        weight: how many times its rows are taken; 0.5 takes half of them.
    """

    path: str
    weight: float = 1.0


DataSource: TypeAlias = str | tuple[DataFile, ...]
"""One file, or several with their weights."""


def list_files(source: DataSource) -> tuple[DataFile, ...]:
    """Return the files of a source, each with its weight."""
    return (DataFile(source),) if isinstance(source, str) else source


def rename_files(source: DataSource, rename: Callable[[str], str]) -> DataSource:
    """Return a source with other paths."""
    if isinstance(source, str):
        return rename(source)
    return tuple(DataFile(rename(file.path), file.weight) for file in source)


def describe_source(source: DataSource) -> str:
    """Return a source for messages: `a.jsonl`, or `a.jsonl, b.jsonl (2 times)`."""
    return ", ".join(
        f"{file.path} ({file.weight:g} times)" if file.weight != 1 else file.path for file in list_files(source)
    )


def read_source(source: DataSource, *, split: str, seed: int, find: LayoutFinder | None = None) -> Rows:
    """Return the rows of one file, or of several mixed by their weights.

    Args:
        split: the split of a data set whose name holds none.
        seed: seed of the choice of rows where a weight takes a part of them.
        find: finds the layout of a file; None for that of its columns.

    Raises:
        DataError: a file cannot be read, see `read_rows`; or the files do not have one format and one type of labels.
    """
    if isinstance(source, str):
        return read_rows(source, split=split, find=find)
    parts = [read_rows(file.path, split=split, find=find) for file in source]
    _check_alike(parts)
    chosen = [
        rows.only(choose_rows(len(rows), file.weight, seed=seed, place=place))
        for place, (rows, file) in enumerate(zip(parts, source, strict=True))
    ]
    return join_rows(chosen, name=describe_source(source))


def choose_rows(count: int, weight: float, *, seed: int, place: int) -> list[int]:
    """Return the indices of the rows that a weight takes of `count`, each as often as it is taken.

    Args:
        place: of the file among the others, so that files of one size do not give the same rows.
    """
    whole = int(weight)
    more = round((weight - whole) * count)
    more = max(more, 0 if whole else 1)
    part = sorted(random.Random(f"{seed} {place}").sample(range(count), more))
    return [*range(count)] * whole + part


def join_rows(parts: Sequence[Rows], *, name: str) -> Rows:
    """Return the rows of several files, one after another; each knows its file by `Rows.parts`."""
    return dataclasses.replace(
        parts[0],
        path=Path(name),
        values=tuple(value for rows in parts for value in rows.values),
        lines=tuple(line for rows in parts for line in rows.lines),
        parts=tuple(parts),
    )


def _check_alike(parts: Sequence[Rows]) -> None:
    """Raise DataError unless all files have the format and the type of labels of the first."""
    first = parts[0]
    for rows in parts[1:]:
        if rows.format != first.format:
            what = f"{first.path} has rows of the format {first.format}, and {rows.path} of the format {rows.format}"
            raise DataError(what, hint="files that are trained on together have one format")
        kinds = [_find_label_type(each) for each in (first, rows)]
        if kinds[0] is not kinds[1] and {*kinds} != {int, float}:  # both are numbers, as in the rows of one file
            names = [kind.__name__ for kind in kinds]
            what = f"the labels of {first.path} are {names[0]}, and those of {rows.path} are {names[1]}"
            raise DataError(what, hint="write all of them as words, or all as whole numbers")
        if has_text_pairs(first) != has_text_pairs(rows):
            which, other = (first, rows) if has_text_pairs(first) else (rows, first)
            what = f"{which.path} has pairs of texts, and {other.path} has single texts"
            raise DataError(what, hint="files that are trained on together have text_pair in all of them or in none")


def has_text_pairs(rows: Rows) -> bool:
    """Return whether rows are pairs of texts with labels."""
    return rows.format == "label" and any(isinstance(value[0], tuple) for value in rows.values)


def _find_label_type(rows: Rows) -> type:
    return next((type(label) for labels in rows.labels for label in labels), type(None))
