"""Reading files of others without harm, and writing folders all or nothing."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import AdapterError, StorageError

_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100


def read_regular(path: Path, *, limit: int | None = None) -> bytearray:
    """The bytes of a regular file inside its folder.

    A link is followed where it stays in the folder, or in the hub's cache that the folder belongs to.

    Raises:
        AdapterError: missing, a link that leads out, not a regular file, or larger than `limit` bytes.
        StorageError: it cannot be read.
    """
    shown = printable(path)
    try:
        if path.is_symlink() and not _inside(path.resolve(), path.parent):
            raise AdapterError(f"{shown} is a link that leads out of its folder", hint="copy the file here")
        # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise AdapterError(f"{shown} does not exist") from None
    except OSError as error:
        raise StorageError(f"{shown} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{shown} is not a regular file")
        if limit is not None and status.st_size > limit:
            raise AdapterError(f"{shown} has {status.st_size:,} bytes; at most {limit:,} are expected")
        data = bytearray(status.st_size)
        read = file.readinto(data)
        return data[:read]


def _inside(path: Path, folder: Path) -> bool:
    """Whether a resolved path lies in a folder, or in the hub cache around a snapshot folder."""
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    return path.is_relative_to(root)


def read_json(path: Path, *, limit: int) -> dict[str, Any]:
    """A JSON object from a small file; AdapterError where it is anything else."""
    text = read_text(path, limit=limit)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise AdapterError(f"{printable(path)}: not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise AdapterError(f"{printable(path)}: nested too deeply") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{printable(path)}: a JSON object was expected, found {type(value).__name__}")
    return value


def read_text(path: Path, *, limit: int) -> str:
    try:
        return read_regular(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{printable(path)}: not UTF-8 at byte {error.start}") from None


def printable(value: object) -> str:
    """Text from outside, with control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def write_folder(
    target: Path, files: Mapping[str, bytes], *, replace: bool = False, owned: Callable[[Path], bool] | None = None
) -> None:
    """Write a folder of these files, in their order, all or nothing; see `staged`."""
    needed = sum(map(len, files.values()))
    with staged(target, replace=replace, owned=owned, needed=needed) as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)


@contextmanager
def staged(
    target: Path, *, replace: bool = False, owned: Callable[[Path], bool] | None = None, needed: int = 0
) -> Iterator[Path]:
    """A sibling folder to write into; when the block ends well it is synced and takes the target's place in one step.

    When the block raises, or the process dies, the target is what it was; what a dead process left behind is removed by
    the next one that writes the same target.

    Args:
        replace: an existing target may be replaced.
        owned: says whether an existing folder is one of ours to replace; an empty one always is.
        needed: bytes that will be written, for the check of free space.

    Raises:
        StorageError: the target exists, another process is writing it, or the disk refuses.
    """
    target = Path(os.path.abspath(target))
    check_output(target, replace=replace, owned=owned)
    staging = target.parent / f".{target.name}.staging"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise StorageError(f"{printable(target)} needs {needed:,} bytes; {free:,} are free")
        lock = _lock(staging, target)
    except OSError as error:
        raise _storage(error, target, needed) from error
    try:
        _empty(staging)
        yield staging
        _sync_tree(staging)
        _take_place(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise _storage(error, target, needed) from error
        raise
    finally:
        os.close(lock)


def check_output(target: Path, *, replace: bool = False, owned: Callable[[Path], bool] | None = None) -> None:
    """Refuse, before any work, an output that exists and may not be replaced.

    Raises:
        StorageError: saying which of the two it is.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise StorageError(f"{printable(target)} exists and is not a folder", hint="choose another output")
    empty = not any(target.iterdir())
    if not empty and not replace:
        raise StorageError(f"{printable(target)} exists already", hint="choose another output, or ask to replace it")
    if not empty and owned is not None and not owned(target):
        raise StorageError(
            f"{printable(target)} holds something else, so it is not replaced", hint="choose another output"
        )


def _storage(error: OSError, target: Path, needed: int) -> StorageError:
    if isinstance(error, StorageError):
        return error
    full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    size = f"; {needed:,} bytes are needed" if full and needed else ""
    return StorageError(f"{printable(target)} cannot be written: {error.strerror or error}{size}")


def _lock(staging: Path, target: Path) -> int:
    """An exclusive lock on the staging folder, held until its descriptor is closed or the process dies."""
    while True:
        staging.mkdir(exist_ok=True)
        descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it may have renamed or removed the folder in between.
            if os.path.lexists(staging) and os.path.samestat(os.fstat(descriptor), os.stat(staging)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise StorageError(f"another process is writing {printable(target)}", hint="wait for it") from None
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def _sync_tree(folder: Path) -> None:
    """Everything below a folder, and the folder, on disk; files readable as the umask says."""
    mask = os.umask(0)
    os.umask(mask)
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            os.fchmod(descriptor, 0o666 & ~mask)  # safetensors' own writer leaves 0600
            os.fsync(descriptor)
            os.close(descriptor)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(staging: Path, target: Path) -> None:
    """Put a finished folder in the target's place in one step, then remove what was there."""
    if not target.exists():
        os.rename(staging, target)
    elif not any(target.iterdir()):
        os.rename(staging, target)  # POSIX: over an empty folder this is one step
    else:
        _exchange(staging, target)
        shutil.rmtree(staging)
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step (Linux `renameat2`); in two renames where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    aside = one.with_name(one.name + ".old")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)
