"""Read files that others wrote without harm."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Final

from lora_kit.errors import AdapterError, OutOfMemoryError, StorageError
from lora_kit.io.strict_json import JsonObject, parse_object
from lora_kit.io.text import escape_text
from lora_kit.io.write_errors import DISK_FULL_ERRNOS

_ABSENT_ERRNOS: Final = (errno.ENOENT, errno.ENOTDIR)
_INVALID_PATH_ERRNOS: Final = (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
"""Of a write alone: no read fails for them."""
_HUGE_PAGES_FROM: Final = 4 * 2**20
_CHUNK_BYTES: Final = 8 * 2**20
_LFS_POINTER: Final = b"version https://git-lfs"


def folder_exists(path: Path) -> bool:
    """Return whether there is a folder at a path; a link to a folder counts.

    Raises:
        StorageError: the file system does not say.
    """
    return stat.S_ISDIR(mode_of(path, follow=True))


def exists(path: Path) -> bool:
    """Return whether there is anything at a path; a link that leads nowhere counts.

    Raises:
        StorageError: the file system does not say.
    """
    return mode_of(path, follow=False) != 0


def mode_of(path: Path, *, follow: bool) -> int:
    """Return `st_mode`; 0 where nothing is there or where no file system takes the path.

    Raises:
        StorageError: the file system does not say.
    """
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except ValueError:  # a NUL
        return 0
    except OSError as error:
        if error.errno in (*_ABSENT_ERRNOS, *_INVALID_PATH_ERRNOS):
            return 0
        raise StorageError(f"{escape_text(path)} cannot be read: {error.strerror}") from error


@contextmanager
def open_regular_file(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file for reading, and yield it with its size in bytes.

    A link is followed where it stays in its folder, or in the hub's cache that the folder belongs to.

    Raises:
        AdapterError: the file is missing, not a regular file, or a link that leads out of its folder.
        StorageError: opening it or the block fails to read it, or there is not enough memory for it.
        OSError: the block, which writes a copy, fails for a full disk.
    """
    shown = escape_text(path)
    try:
        with _open(path, shown) as file:
            yield file, os.fstat(file.fileno()).st_size
    except StorageError:
        raise
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise
        if error.errno in _ABSENT_ERRNOS:
            raise AdapterError(f"{shown} does not exist") from None
        if error.errno in _INVALID_PATH_ERRNOS:
            raise AdapterError(f"{shown} leads nowhere: {error.strerror}") from None
        raise StorageError(f"{shown} cannot be read: {error.strerror}") from error
    except MemoryError:
        raise OutOfMemoryError(f"{shown} does not fit in memory") from None


def read_regular_file(path: Path, *, check_size: Callable[[int], None]) -> memoryview:
    """Read a whole regular file; see `open_regular_file`.

    Args:
        check_size: is called with the size of the file in bytes, and raises to reject it.
    """
    with open_regular_file(path) as (file, size):
        check_size(size)
        data = allocate_buffer(size, escape_text(path))
        return data[: read_into(file, data)]  # it may have shrunk meanwhile


def _open(path: Path, shown: str) -> BufferedReader:
    real = Path(os.path.realpath(path, strict=True))
    if path.is_symlink() and not _is_inside(real, path.parent):
        raise AdapterError(f"{shown} is a link that leads out of its folder", hint="copy the file here")
    # Checked first, since opening a device may act on it. Without O_NONBLOCK, opening a FIFO waits for a writer.
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise AdapterError(f"{shown} is not a regular file")
    file = os.fdopen(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise AdapterError(f"{shown} is not a regular file")
    return file


def _is_inside(real: Path, folder: Path) -> bool:
    """Return whether a resolved path lies in a folder, or in the hub's cache around a snapshot folder."""
    root = folder.resolve()
    for above in root.parents:
        if above.name == "snapshots" and (above.parent / "blobs").is_dir():
            root = above.parent
    return real.is_relative_to(root)


def allocate_buffer(size: int, source: str) -> memoryview:
    """Allocate memory to read a file into; in huge pages for a large file, since touching small ones costs more than
    reading.

    Args:
        size: bytes of the file.
        source: the file, for messages.

    Raises:
        StorageError: there is not enough memory.
    """
    if size < _HUGE_PAGES_FROM:
        return memoryview(bytearray(size))
    available = available_memory()
    if available is not None and size > available:
        raise OutOfMemoryError(f"{source} needs {size:,} bytes of memory; {available:,} are available")
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(size))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def read_into(file: BufferedReader, memory: memoryview, seen: Callable[[memoryview], object] | None = None) -> int:
    """Read from a file until memory is full or the file ends, and return how many bytes were read.

    Args:
        seen: is called with each piece as it is read.
    """
    filled = 0
    while filled < len(memory):
        piece = memory[filled : filled + _CHUNK_BYTES]
        count = file.readinto(piece)
        if not count:
            break
        if seen is not None:
            seen(piece[:count])
        filled += count
    return filled


def available_memory() -> int | None:
    """Return the bytes that the machine can give without swapping; None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def hash_file(path: Path) -> dict[str, object]:
    """Return the sha256 in hex and the size in bytes of a file, as records name them.

    Raises:
        AdapterError: it is no regular file, or cannot be read.
    """
    with open_regular_file(path) as (file, size):
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": size}


def has_recorded_hash(path: Path, facts: object) -> bool:
    """Return whether a file has the size and sha256 that a record says; one of another size is not read for it.

    Raises:
        AdapterError: as `hash_file`.
    """
    with open_regular_file(path) as (_, size):
        is_possible = isinstance(facts, dict) and facts.get("size") == size
    return is_possible and hash_file(path) == facts


def read_json(path: Path, *, limit: int) -> JsonObject:
    """Read a JSON object from a file of at most `limit` bytes.

    Raises:
        AdapterError: the file is anything else.
        StorageError: it cannot be read.
    """
    text = read_text(path, limit=limit)
    try:
        return parse_object(text)
    except ValueError as error:
        raise AdapterError(f"{escape_text(path)}: {error}") from None


def read_text(path: Path, *, limit: int) -> str:
    """Read UTF-8 text from a file of at most `limit` bytes.

    Raises:
        AdapterError: the file is anything else.
        StorageError: it cannot be read.
    """

    def check_size(size: int) -> None:
        if size > limit:
            raise AdapterError(f"{escape_text(path)} has {size:,} bytes; at most {limit:,} are expected")

    data = bytes(read_regular_file(path, check_size=check_size))
    refuse_lfs_pointer(data, escape_text(path))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise AdapterError(f"{escape_text(path)}: not UTF-8 at line {line} column {column}") from None


def refuse_lfs_pointer(start: bytes, source: str) -> None:
    """Raise AdapterError for a file that is a git-lfs pointer and not the file it stands for.

    Args:
        start: the first bytes of the file.
        source: the file, for the message.
    """
    if start.startswith(_LFS_POINTER):
        raise AdapterError(f"{source}: a git-lfs pointer, not the file", hint="run 'git lfs pull'")
