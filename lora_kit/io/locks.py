"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lora_kit.errors import StorageError
from lora_kit.io.text import escape_text

_MAX_NOTE_BYTES: Final = 4096


class FileLock:
    """An exclusive `flock` on a file of its own; the file and the folders above it are created where they are missing.

    It locks a file and not a folder, since NFS locks no folders.

    Args:
        path: of the lock file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def acquire(self) -> bool:
        """Wait until the lock is free, and take it.

        Returns:
            True, always: Optuna asks its locks for an answer.
        """
        return self._acquire(fcntl.LOCK_EX)

    def acquire_now(self) -> bool:
        """Take the lock if it is free, and return whether it was."""
        try:
            return self._acquire(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False

    @property
    def is_held(self) -> bool:
        """Whether a process holds the lock, found out without writing: for a moment it is held shared, if it is free.

        Raises:
            StorageError: the file may not be read.
        """
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise StorageError(f"{escape_text(self._path)} cannot be read: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def release(self) -> None:
        """Release the lock; its file stays."""
        os.close(self._descriptor)

    def release_and_remove(self) -> None:
        """Release the lock and remove its file, unless that has another name by now."""
        # The file goes first: a process that waits for it sees that another file has its name now, and opens that one.
        with contextlib.suppress(OSError):
            if self._is_current(self._descriptor):
                self._path.unlink()
        self.release()

    def read_note(self) -> bytes:
        """Return what the last holder wrote down; empty where it removed its file, or wrote nothing."""
        return os.pread(self._descriptor, _MAX_NOTE_BYTES, 0)

    def write_note(self, note: bytes) -> None:
        """Write down, synced to disk, what the next holder should know if this process dies."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, note, 0)
        os.fsync(self._descriptor)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the lock while the block runs."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _open(self) -> int:
        """Open the file, with its folder, and return its descriptor.

        Raises:
            StorageError: something else is in the place of one of them.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            what = f"{escape_text(error.filename)} is in the way, and is not of lora_kit"
            raise StorageError(what, hint="move it, or choose another output") from None

    def _acquire(self, operation: int) -> bool:
        while True:
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, operation)
                if self._is_current(descriptor):
                    self._descriptor = descriptor
                    return True
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        """Whether an open file still is the one at the path: the last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False
