"""Who may write an output, and what a writer that died has left beside it.

The names beside a folder `m` are `.m.lock`, `.m.staging` and `.m.replaced`. The lock's file says by device and inode
which folders are under the other two; what it does not name is somebody else's, and is not touched. Beside a file `m`
is `.m.lora_kit-<process>`, which who writes it holds locked: under such a name, what nobody holds was left behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lora_kit.errors import StorageError
from lora_kit.io.locks import FileLock
from lora_kit.io.text import escape_text

_NOTE_TITLE: Final = b"folders of lora_kit:"
"""Begins the note in a lock's file, which names the folders that a dead process has left, by device and inode."""
_MOST_HELD: Final = 5
"""How often a lock is found held before that is believed: some take it for a moment, to see if it is free."""
_MOST_TRIES: Final = 500
_TRY_SECONDS: Final = 0.01
_STAGED: Final = "lora_kit-"


@contextmanager
def lock_target(target: Path) -> Iterator[FileLock]:
    """Be the only writer of a target until the block ends or the process dies.

    Raises:
        StorageError: another process is, or the lock's file is somebody's own.
    """
    path = lock_path(target)
    lock = FileLock(path)
    if not _acquire_soon(lock):
        raise StorageError(f"another process is writing {escape_text(target)}", hint="wait for it")
    note = lock.read_note()
    if note and not note.startswith(_NOTE_TITLE):
        lock.release()
        raise _in_the_way_error(path)
    try:
        yield lock
    finally:
        # A note is needed as long as a folder that could not be removed is there.
        has_leftovers = any(os.path.lexists(sibling_path(target, suffix)) for suffix in ("staging", "replaced"))
        lock.release() if has_leftovers and lock.read_note() else lock.release_and_remove()


def _acquire_soon(lock: FileLock) -> bool:
    """Take a lock and return whether it was free; those who only look at it (`FileLock.is_held`) are waited for."""
    held = 0
    for _ in range(_MOST_TRIES):
        if lock.acquire_now():
            return True
        held += lock.is_held
        if held > _MOST_HELD:
            break
        time.sleep(_TRY_SECONDS)
    return False


def recover_target(target: Path, lock: FileLock) -> None:
    """Restore or remove what a process that died has left behind; nothing else is touched.

    Raises:
        StorageError: there is something of somebody else under a name that is needed.
    """
    own = lock.read_note().split()
    aside, staging = sibling_path(target, "replaced"), sibling_path(target, "staging")
    for path in (aside, staging):
        if path.is_symlink():
            path.unlink()
        elif os.path.lexists(path) and not (path.is_dir() and (_identify(path) in own or is_empty_folder(path))):
            raise _in_the_way_error(path)
    if os.path.lexists(aside) and not os.path.lexists(target):
        os.rename(aside, target)
    for path in (aside, staging):
        if path.exists():
            shutil.rmtree(path)


def remove_folder(folder: Path, *, last: Sequence[str]) -> None:
    """Remove a folder of ours; a process that dies meanwhile leaves one that is still seen to be ours, or an empty one.

    Args:
        last: names of the files that show whose it is.
    """
    for entry in folder.iterdir():
        if entry.name not in last:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for name in last:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def note_own_folders(lock: FileLock, *folders: Path) -> None:
    """Write down which folders may be under the name of the staging folder: the new one, and the one it replaces."""
    lock.write_note(b" ".join([_NOTE_TITLE, *(_identify(folder) for folder in folders if folder.is_dir())]))


@contextmanager
def open_staging_file(target: Path) -> Iterator[Path]:
    """Yield a sibling path with an empty file to write a target in, and remove what is there when the block ends.

    Those that processes which died have left beside the target are removed first. Threads of a process take turns.

    Raises:
        OSError: the file system fails.
    """
    remove_staging_files(target)
    path = sibling_path(target, f"{_STAGED}{os.getpid()}")
    lock = FileLock(path)
    lock.acquire()
    try:
        yield path
    finally:
        lock.release_and_remove()


def remove_staging_files(target: Path) -> None:
    """Remove what processes that died have left of `open_staging_file` beside a target."""
    with os.scandir(target.parent) as entries:
        left = [
            each.name for each in entries if is_staging_file(each.name, target) and each.is_file(follow_symlinks=False)
        ]
    for name in left:
        lock = FileLock(target.with_name(name))
        with contextlib.suppress(OSError):  # of another user
            if lock.acquire_now():
                lock.release_and_remove()


def is_staging_file(name: str, target: Path) -> bool:
    """Return whether a name is one of those beside a target that it is written under."""
    return re.fullmatch(re.escape(sibling_path(target, _STAGED).name) + "[0-9]+", name) is not None


def _identify(folder: Path) -> bytes:
    status = os.lstat(folder)
    return f"{status.st_dev}:{status.st_ino}".encode()


def _in_the_way_error(path: Path) -> StorageError:
    return StorageError(
        f"{escape_text(path)} is in the way, and is not of lora_kit", hint="move it, or choose another output"
    )


def lock_path(target: Path) -> Path:
    """Return the file that the only writer of a target locks."""
    return sibling_path(target, "lock")


def sibling_path(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def is_empty_folder(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None
