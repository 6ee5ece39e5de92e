"""Rows that do not fit in memory: read from the disk in chunks, each time they are gone through.

    RowStream.open    the whole file is read once: every invalid row is an error before anything is encoded
    RowStream.chunks  at most `CHUNK_ROWS` rows at a time, in the order of the file

The rows are those that `lora_kit.data.rows.read_rows` returns.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lora_kit.data.layouts import Layout
from lora_kit.data.mixture import DataFile, DataSource, choose_rows, describe_source, list_files
from lora_kit.data.record_stream import hash_records, open_records
from lora_kit.data.records import Fault, Parsed, Record
from lora_kit.data.rows import (
    Rows,
    build_empty_error,
    build_fault_error,
    convert_records,
    refuse_ignored_columns,
    require_layout,
    warn_of_unused,
)
from lora_kit.errors import DataError
from lora_kit.io.given_values import parse_path

CHUNK_ROWS: Final = 256
"""Rows in memory at once."""


@dataclass(frozen=True)
class RowStream:
    """The rows of one file.

    Attributes:
        path: the file, or the name of a data set.
        split: the split of a data set whose name holds none.
        layout: of its columns.
        count: number of rows.
        digest: sha256 of the file, or of the rows of a data set.
        first: its first rows.
    """

    path: Path
    split: str
    layout: Layout
    count: int
    digest: str
    first: Rows

    @classmethod
    def open(cls, path: str | Path, *, split: str = "train") -> RowStream:
        """Read a file once, and check every row of it.

        Raises:
            DataError: as `read_rows`, though only invalid lines near the first one are listed.
        """
        path = parse_path(path, name="the file of rows")
        count, first, unused = 0, None, set[str]()
        with open_records(path, split=split) as parsed:
            for layout, records in _iterate_chunks(path, parsed):
                rows = _convert(path, layout, records)
                unused |= {key for _, row in records for key in row} - {*layout.keys, *layout.optional}
                first, count = first or rows, count + len(rows)
        if first is None:
            raise build_empty_error(path)
        warn_of_unused(path, unused)
        return cls(path, split, layout, count, hash_records(path, split=split), first)

    def chunks(self, indices: Sequence[int] | None = None) -> Iterator[Rows]:
        """Yield the rows in chunks.

        Args:
            indices: of the rows to yield, ascending; None for all.

        Raises:
            DataError: the file has changed since it was opened.
        """
        wanted, start = None if indices is None else set(indices), 0
        with open_records(self.path, split=self.split) as parsed:
            for layout, records in _iterate_chunks(self.path, parsed):
                rows = _convert(self.path, layout, records)
                end = start + len(rows)
                if wanted is None:
                    yield rows
                elif chosen := [index - start for index in range(start, end) if index in wanted]:
                    yield rows.only(chosen)
                start = end
        if start != self.count:
            raise DataError(f"{self.path} had {self.count:,} rows and has {start:,} now", hint="start again")


def _iterate_chunks(path: Path, parsed: Parsed) -> Iterator[tuple[Layout, list[Record]]]:
    """Yield the records of a file in chunks, with the layout of the first.

    Raises:
        DataError: a chunk has rows that could not be parsed.
    """
    layout: Layout | None = None
    while chunk := list(itertools.islice(parsed, CHUNK_ROWS)):
        faults = [item for item in chunk if isinstance(item, Fault)]
        if faults:
            raise build_fault_error(path, faults)
        records = [item for item in chunk if not isinstance(item, Fault)]
        layout = layout or require_layout(path, records[0][1])
        yield layout, records


def _convert(path: Path, layout: Layout, records: Sequence[Record]) -> Rows:
    refuse_ignored_columns(path, layout, records)
    rows, faults = convert_records(path, layout, records)
    if faults:
        raise build_fault_error(path, sorted(faults))
    return rows


@dataclass(frozen=True)
class StreamedSource:
    """One file or several, each with its weight, as `lora_kit.data.mixture` mixes them.

    Attributes:
        files: the files.
        streams: the rows of each.
        seed: seed of the choice of rows where a weight takes a part of them.
    """

    files: tuple[DataFile, ...]
    streams: tuple[RowStream, ...]
    seed: int

    @classmethod
    def open(cls, source: DataSource, *, split: str, seed: int) -> StreamedSource:
        """Open every file of a source, and check every row.

        Raises:
            DataError: a file cannot be read, or the files do not have one format.
        """
        files = list_files(source)
        streams = tuple(RowStream.open(file.path, split=split) for file in files)
        for stream in streams[1:]:
            if stream.first.format != (first := streams[0].first).format:
                what = f"{first.path} has rows of the format {first.format}, and {stream.path} of {stream.first.format}"
                raise DataError(what, hint="files that are trained on together have one format")
        return cls(files, streams, seed)

    @property
    def first(self) -> Rows:
        """The first rows of the first file, under the name of all files."""
        return dataclasses.replace(self.streams[0].first, path=Path(describe_source(self.files)))

    @property
    def identity(self) -> dict[str, object]:
        """What decides which rows are taken, and how often."""
        files = [[stream.digest, file.weight] for stream, file in zip(self.streams, self.files, strict=True)]
        return {"files": files, "seed": self.seed}

    def chunks(self) -> Iterator[Rows]:
        """Yield the rows that the weights take, in the order in which `read_source` returns them."""
        for place, (file, stream) in enumerate(zip(self.files, self.streams, strict=True)):
            taken = choose_rows(stream.count, file.weight, seed=self.seed, place=place)
            for _ in range(whole := int(file.weight)):
                yield from stream.chunks()
            part = taken[whole * stream.count :]
            if part:
                yield from stream.chunks(part)
