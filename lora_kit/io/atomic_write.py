"""Writing folders all or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lora_kit.errors import StorageError
from lora_kit.io.read import mode_of
from lora_kit.io.text import escape_text

FolderPredicate = Callable[[Path], bool]
"""Says whether an existing folder is one of ours, which may be replaced."""

_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_NO_EXCHANGE: Final = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_NO_FOLDER_SYNC: Final = (errno.EINVAL, errno.ENOTSUP)
_DISK_FULL_ERRNOS: Final = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def write_folder(
    target: Path, files: Mapping[str, bytes], *, replace: bool = False, owned: FolderPredicate | None = None
) -> None:
    """Write a folder of these files, in their order, all or nothing; see `staged`."""
    needed = sum(map(len, files.values()))
    with stage_folder(target, replace=replace, owned=owned, needed=needed) as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)


@contextmanager
def stage_folder(
    target: Path, *, replace: bool = False, owned: FolderPredicate | None = None, needed: int = 0
) -> Iterator[Path]:
    """A sibling folder to write into; when the block ends well it is synced and takes the target's place in one step.

    When the block raises, or the process dies, the target is what it was; what a dead process left behind is removed by
    the next one that writes the same target. Where the file system cannot exchange two folders, replacing takes two
    renames: dying between them leaves the target missing until that next one puts it back.

    Args:
        replace: an existing target may be replaced.
        owned: whether an existing folder is one of ours to replace; an empty one always is.
        needed: bytes that will be written, for the check of free space.

    Raises:
        StorageError: the target exists, another process is writing it, or the disk refuses.
    """
    target = Path(os.path.abspath(target))
    check_output(target, replace=replace, owned=owned)
    with _translate_os_errors(target, needed), _create_parents(target), _lock(target):
        _recover(target)
        check_output(target, replace=replace, owned=owned)  # another process may have written it in between
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise StorageError(f"{escape_text(target)} needs {needed:,} bytes; {free:,} are free")
        staging = _sibling_path(target, "staging")
        try:
            staging.mkdir()
            yield staging
            _sync_tree(staging)
            _move_into_place(staging, target, replace=replace)
        finally:
            # It holds what was not finished, or what was replaced.
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def lock_output(target: Path) -> Iterator[None]:
    """Nobody else works on a target until the block ends or the process dies; the folders above it are there.

    Raises:
        StorageError: another process does, or the place cannot be written to.
    """
    target = Path(os.path.abspath(target))
    with contextlib.ExitStack() as stack:
        with _translate_os_errors(target, 0):
            stack.enter_context(_create_parents(target))
            stack.enter_context(_lock(target))
        yield


def check_output(target: Path, *, replace: bool = False, owned: FolderPredicate | None = None) -> None:
    """Refuse, before any work, an output that exists and may not be replaced.

    Raises:
        StorageError: saying which of the two it is.
    """
    check_path(target)
    mode = mode_of(target, follow=False)
    if not mode:
        return
    if not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a folder"
        raise StorageError(f"{escape_text(target)} exists and is {kind}", hint="choose another output")
    with _translate_os_errors(target, 0):
        if _is_empty(target):
            return
        if not replace:
            raise _already_exists_error(target)
        if owned is not None and not owned(target):
            raise StorageError(
                f"{escape_text(target)} holds something else, so it is not replaced", hint="choose another output"
            )


def check_path(target: Path) -> None:
    """Raise StorageError for a path that no file system takes."""
    if "\0" in str(target):
        raise StorageError(f"{escape_text(target)} is not a path", hint="choose another output")


def _already_exists_error(target: Path) -> StorageError:
    return StorageError(f"{escape_text(target)} exists already", hint="choose another output, or ask to replace it")


def _is_empty(folder: Path) -> bool:
    return next(folder.iterdir(), None) is None


@contextmanager
def _translate_os_errors(target: Path, needed: int) -> Iterator[None]:
    """An OSError is raised again as a StorageError that names the target and, on a full disk, the bytes needed."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        size = f"; {needed:,} bytes are needed" if error.errno in _DISK_FULL_ERRNOS and needed else ""
        raise StorageError(f"{escape_text(target)} cannot be written: {error.strerror or error}{size}") from error


@contextmanager
def _create_parents(target: Path) -> Iterator[None]:
    """The folders above a target; those that were missing are taken away again when the block raises."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def _sibling_path(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """The only writer of a target, until the block ends or the process dies. A file, since NFS locks no folders."""
    path = _sibling_path(target, "lock")
    descriptor = _acquire_lock(path, target)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked: who opened it meanwhile finds out, and begins again
        os.close(descriptor)


def _acquire_lock(path: Path, target: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise StorageError(f"another process is writing {escape_text(target)}", hint="wait for it") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _recover(target: Path) -> None:
    """Put back or remove what a process that died has left behind."""
    aside, staging = _sibling_path(target, "replaced"), _sibling_path(target, "staging")
    if os.path.lexists(aside) and not os.path.lexists(target):
        os.rename(aside, target)
    for left in (aside, staging):
        if left.is_symlink() or left.is_file():
            left.unlink()
        elif left.exists():
            shutil.rmtree(left)


def _sync_tree(folder: Path) -> None:
    """Everything below a folder, and the folder, on disk; files readable as the umask says."""
    mode = os.stat(folder).st_mode & 0o666  # it was made under the umask; safetensors' own writer leaves files 0600
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """The entries of a folder on disk, where the file system can promise it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _move_into_place(staging: Path, target: Path, *, replace: bool) -> None:
    """Put a finished folder in the target's place in one step; what was there is in the staging folder then.

    A failure undoes the step.
    """
    swap = replace and target.exists() and not _is_empty(target)
    if swap:
        _exchange(staging, target)
    else:
        _rename_over_nothing(staging, target)
    try:
        sync_folder(target.parent)
    except OSError:
        if swap:
            _exchange(staging, target)
        else:
            os.rename(target, staging)
        raise


def _rename_over_nothing(staging: Path, target: Path) -> None:
    """A rename that fails where the target is anything but absent or an empty folder."""
    try:
        os.rename(staging, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise _already_exists_error(target) from None
        raise


def _exchange(staging: Path, target: Path) -> None:
    """Swap two folders in one step (Linux `renameat2`); in two renames where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if renameat2 is not None:
        one, other = os.fsencode(staging), os.fsencode(target)
        code = renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE) and ctypes.get_errno()
    if code in _NO_EXCHANGE:
        _exchange_in_two(staging, target)
    elif code:
        raise OSError(code, os.strerror(code))


def _exchange_in_two(staging: Path, target: Path) -> None:
    aside = _sibling_path(target, "replaced")
    try:
        os.rename(target, aside)
        os.rename(staging, target)
        os.rename(aside, staging)
    except BaseException:
        if aside.exists():
            if target.exists():
                os.rename(target, staging)
            os.rename(aside, target)
        raise
