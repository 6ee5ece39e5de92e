"""The rows of a file one by one, for files that do not fit in memory.

JSONL, CSV, TSV and text are read line by line, from gzip too, and Parquet row group by row group; a data set of the
hub is mapped from the disk by `datasets`. An array in a `.json` file can only be read whole, so it is rejected.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from lora_kit.data.encodings import BYTE_ORDER_MARK
from lora_kit.data.hub_datasets import is_dataset, iterate_dataset
from lora_kit.data.parquet import parse_parquet
from lora_kit.data.readers import GZIP, JSON, check_is_file, find_parser
from lora_kit.data.records import Parsed, check_not_utf16
from lora_kit.data.size_limits import check_unpacked_size
from lora_kit.errors import DataError

_BUFFER_BYTES: Final = 2**18


@contextmanager
def open_records(path: Path, *, split: str) -> Iterator[Parsed]:
    """Open a file in UTF-8, or a data set of the hub; its rows and faults are those of `lora_kit.data.readers`.

    Args:
        split: the split of a data set whose name holds none.

    Raises:
        DataError: the file is missing, is of a kind that is read whole, or cannot be parsed.
    """
    if is_dataset(path):
        yield iterate_dataset(path, split=split)
        return
    check_is_file(path)
    parse = find_parser(path)
    if JSON in (path.suffix.lower(), Path(path.stem).suffix.lower() if path.suffix.lower() == GZIP else ""):
        raise DataError(f"{path}: a .json file is read whole, so it cannot be streamed", hint="write it as .jsonl")
    try:
        with path.open("rb") as file:
            is_parquet = parse is parse_parquet
            yield parse_parquet(path, file, is_streamed=True) if is_parquet else parse(path, _open_text(path, file))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def hash_records(path: Path, *, split: str) -> str:
    """Return the sha256 of a file, or of the rows of a data set, in hex."""
    if is_dataset(path):
        digest = hashlib.sha256()
        for item in iterate_dataset(path, split=split):
            digest.update(json.dumps(item, sort_keys=True, default=repr).encode() + b"\n")
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_text(path: Path, file: io.BufferedReader) -> BinaryIO:
    """Return a text without its byte order mark, unpacked if it is packed."""
    text = file
    if path.suffix.lower() == GZIP:
        unpacked = cast("io.RawIOBase", _UnpackedText(path, file, path.stat().st_size))
        text = io.BufferedReader(unpacked, _BUFFER_BYTES)
    check_not_utf16(path, text.peek(len(BYTE_ORDER_MARK)))
    if text.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):
        text.read(len(BYTE_ORDER_MARK))
    return text


class _UnpackedText(io.RawIOBase):
    """A gzip stream that is rejected once it unpacks to far more than a text does."""

    def __init__(self, path: Path, file: BinaryIO, packed: int) -> None:
        self._path, self._packed, self._size = path, packed, 0
        self._unpacked = gzip.GzipFile(fileobj=file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._unpacked.read(len(buffer))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self._path}: not gzip: {error}") from None
        self._size += len(data)
        check_unpacked_size(self._path, self._size, self._packed, is_streamed=True)
        buffer[: len(data)] = data
        return len(data)
