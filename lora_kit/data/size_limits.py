"""How much a file of rows may cost: sizes are known before anything is unpacked, and a limit names the way out.

A packed file may unpack to a multiple of its own size, so what is read stays in proportion to what was given. Without
that, ten kilobytes of gzip or Parquet take all the memory there is.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Final

from lora_kit.errors import DataError

MAX_FILE_BYTES: Final = 2**32
"""Bytes of a file that is read whole, at most: packed and unpacked."""
MAX_TEXT_LENGTH: Final = 2**22
"""Characters of one text, at most. A tokenizer takes some 150 bytes for each: 600 MB for a text of this length."""
MAX_COLUMNS: Final = 4096
"""Columns of a table, at most."""
_FREE_BYTES: Final = 2**26
"""Bytes that any file may unpack to."""
_MAX_RATIO: Final = 100
"""How many times its own size a larger file may unpack to. Texts shrink to a third or a tenth."""
_GZIP_WINDOW: Final = 16 + zlib.MAX_WBITS
"""For zlib: a stream with the header of gzip."""
_READ_BYTES: Final = 2**20


def compute_unpack_limit(packed: int, *, is_streamed: bool = False) -> int:
    """Return how many bytes a file of `packed` bytes may unpack to; `is_streamed` means that it is not read whole."""
    limit = max(_FREE_BYTES, _MAX_RATIO * packed)
    return limit if is_streamed else min(MAX_FILE_BYTES, limit)


def check_file_size(path: Path, size: int) -> None:
    """Raise DataError for a file that is too large to be read whole."""
    if size > MAX_FILE_BYTES:
        what = f"{path} has {size:,} bytes; a file that is read whole has at most {MAX_FILE_BYTES:,}"
        raise DataError(what, hint="data.streaming: true does not read it whole; or split it: data.train takes a list")


def check_unpacked_size(path: Path, size: int, packed: int, *, what: str = "bytes", is_streamed: bool = False) -> None:
    """Raise DataError for a packed file that would take more memory than one of its size may."""
    limit = compute_unpack_limit(packed, is_streamed=is_streamed)
    if size > limit:
        message = f"{path} has {packed:,} bytes and unpacks to {size:,} {what} or more; at most {limit:,} are read"
        raise DataError(message, hint="unpack it into JSONL or CSV, or split it")


def unpack_gzip(path: Path, packed: bytes) -> bytes:
    """Return the contents of a gzip file, of one member or several.

    Raises:
        DataError: it is damaged, or would unpack to too much; see `compute_unpack_limit`.
    """
    limit, parts, size, rest = compute_unpack_limit(len(packed)), [], 0, packed
    while rest:
        member = zlib.decompressobj(_GZIP_WINDOW)
        while not member.eof:
            try:
                part = member.decompress(rest, _READ_BYTES)
            except zlib.error as error:
                raise DataError(f"{path}: not gzip: {error}") from None
            if not part and not member.eof and not member.unconsumed_tail:
                raise DataError(f"{path}: not gzip: it ends before its contents do")
            parts.append(part)
            size += len(part)
            if size > limit:
                check_unpacked_size(path, size, len(packed))
            rest = member.unconsumed_tail
        rest = member.unused_data.lstrip(b"\0")
    return b"".join(parts)
