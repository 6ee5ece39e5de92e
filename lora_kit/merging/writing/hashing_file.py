"""A file that is hashed and written behind the back of whoever makes its bytes, and read back past the page cache."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

FileDigest = dict[str, Any]
"""Size and sha256 of a file."""

_BUFFER_BYTES: Final = 2 * 2**20
"""Bytes that are handed over at once: handing them over takes as long as hashing some thousands of them."""
_MAX_PENDING: Final = 4
"""Slabs that may wait to be hashed and written."""
_READ_BYTES: Final = 8 * 2**20


class HashingFile:
    """Takes the bytes of a file in their order.

    Args:
        file: to be written.
        pool: of one worker, so that pieces stay in their order.
        slabs: memory of other sinks of the same pool, to be used again: touching new pages costs more than hashing.
    """

    def __init__(self, file: FileIO, pool: ThreadPoolExecutor, slabs: deque[Tensor]) -> None:
        self._file, self._pool, self._free_buffers = file, pool, slabs
        self._sha, self._size = hashlib.sha256(), 0
        self._batch: list[memoryview] = []
        self._slab: Tensor | None = None
        self._used = 0
        self._pending: deque[Future[None]] = deque()

    def put(self, piece: memoryview) -> None:
        """Bytes that stay as they are."""
        self._batch.append(piece)
        if sum(held.nbytes for held in self._batch) >= _BUFFER_BYTES:
            self._hand_over()

    def room(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory for so many numbers, which come next in the file; to be filled before anything else is asked for."""
        size = count * dtype.itemsize
        if self._slab is None or self._used + size > len(self._slab) or self._used % dtype.itemsize:
            self._hand_over()
            known = self._free_buffers.popleft() if self._free_buffers and size <= _BUFFER_BYTES else None
            self._slab = torch.empty(max(size, _BUFFER_BYTES), dtype=torch.uint8) if known is None else known
        part = self._slab[self._used : self._used + size]
        self._used += size
        self._batch.append(part.numpy().data)
        return part.view(dtype)

    def _hand_over(self) -> None:
        if len(self._pending) >= _MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._take_all, self._batch, self._slab))
        self._batch, self._slab, self._used = [], None, 0

    def _take_all(self, pieces: Sequence[memoryview], slab: Tensor | None) -> None:
        for piece in pieces:
            self._take(piece)
        if slab is not None and len(slab) == _BUFFER_BYTES:
            self._free_buffers.append(slab)

    def _take(self, piece: memoryview) -> None:
        self._sha.update(piece)
        self._size += piece.nbytes
        while piece.nbytes:
            piece = piece[self._file.write(piece) :]

    def finish(self) -> FileDigest:
        """Size and sha256 of what was written."""
        self._hand_over()
        while self._pending:
            self._pending.popleft().result()
        return {"size": self._size, "sha256": self._sha.hexdigest()}


def hash_on_disk(path: Path) -> FileDigest:
    """Size and sha256 of what the disk has of a file, once it is synced: nothing is taken from the page cache.

    Where a file system cannot read past the cache, the kernel is asked to forget the file before.
    """
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
    try:
        return _hash_uncached(path, getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return _hash_uncached(path, 0)


def _hash_uncached(path: Path, flags: int) -> FileDigest:
    sha, found = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        if not flags and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        with (
            mmap.mmap(-1, _READ_BYTES) as memory,
            memoryview(memory) as pages,
        ):  # whole pages, as reading past the cache asks
            while found < size and (count := os.readv(descriptor, [memory])):
                sha.update(pages[:count])
                found += count
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": sha.hexdigest()}
