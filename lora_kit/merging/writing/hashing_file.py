"""A file that another thread hashes and writes while its bytes are computed; and its digest as the disk has it."""

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
from typing import Final, TypedDict

import torch
from torch import Tensor


class FileDigest(TypedDict):
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


_BUFFER_BYTES: Final = 2 * 2**20
"""Bytes that are handed to the other thread at once: handing over costs as much as hashing some thousands of bytes."""
_MAX_PENDING: Final = 4
"""Batches that may wait to be hashed and written."""
_READ_BYTES: Final = 8 * 2**20


class HashingFile:
    """Takes the bytes of a file in their order.

    Args:
        file: to write.
        pool: of one worker, which keeps the order.
        buffers: free memory, shared with other files of the pool: touching new pages costs more than hashing.
    """

    def __init__(self, file: FileIO, pool: ThreadPoolExecutor, buffers: deque[Tensor]) -> None:
        self._file, self._pool, self._free_buffers = file, pool, buffers
        self._sha, self._size = hashlib.sha256(), 0
        self._batch: list[memoryview] = []
        self._buffer: Tensor | None = None
        self._used = 0
        self._pending: deque[Future[None]] = deque()

    def put(self, piece: memoryview) -> None:
        """Append bytes, which must not change afterwards."""
        self._batch.append(piece)
        if sum(waiting.nbytes for waiting in self._batch) >= _BUFFER_BYTES:
            self._hand_over()

    def reserve(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory for the next values of the file; the caller fills it before the next call."""
        size = count * dtype.itemsize
        if self._buffer is None or self._used + size > len(self._buffer) or self._used % dtype.itemsize:
            self._hand_over()
            free = self._free_buffers.popleft() if self._free_buffers and size <= _BUFFER_BYTES else None
            self._buffer = torch.empty(max(size, _BUFFER_BYTES), dtype=torch.uint8) if free is None else free
        values = self._buffer[self._used : self._used + size]
        self._used += size
        self._batch.append(values.numpy().data)
        return values.view(dtype)

    def _hand_over(self) -> None:
        if len(self._pending) >= _MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._take_all, self._batch, self._buffer))
        self._batch, self._buffer, self._used = [], None, 0

    def _take_all(self, pieces: Sequence[memoryview], buffer: Tensor | None) -> None:
        for piece in pieces:
            self._take(piece)
        if buffer is not None and len(buffer) == _BUFFER_BYTES:
            self._free_buffers.append(buffer)

    def _take(self, piece: memoryview) -> None:
        self._sha.update(piece)
        self._size += piece.nbytes
        while piece.nbytes:
            piece = piece[self._file.write(piece) :]

    def finish(self) -> FileDigest:
        """Write what is left, and return the size and sha256 of the file."""
        self._hand_over()
        while self._pending:
            self._pending.popleft().result()
        return {"size": self._size, "sha256": self._sha.hexdigest()}


def hash_on_disk(path: Path) -> FileDigest:
    """Sync a file and return the size and sha256 of what the disk has, not of the page cache.

    Where a file system cannot bypass the cache, the kernel is asked to drop the file from it first.
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
    sha, done = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        if not flags and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(descriptor).st_size
        # Bypassing the cache needs memory in whole pages.
        with mmap.mmap(-1, _READ_BYTES) as memory, memoryview(memory) as pages:
            while done < size and (count := os.readv(descriptor, [memory])):
                sha.update(pages[:count])
                done += count
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": sha.hexdigest()}
