"""Write folders and files all or nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lora_kit.errors import StorageError
from lora_kit.io.output_lock import (
    is_empty_folder,
    lock_target,
    note_own_folders,
    open_staging_file,
    recover_target,
    sibling_path,
)
from lora_kit.io.output_overlap import refuse_overlap
from lora_kit.io.output_path import check_path
from lora_kit.io.read import mode_of
from lora_kit.io.text import escape_text
from lora_kit.io.write_errors import translate_os_errors

FolderPredicate = Callable[[Path], bool]
"""Returns whether an existing folder is one of ours, which may be replaced."""

_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_NO_EXCHANGE: Final = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_NO_FOLDER_SYNC: Final = (errno.EINVAL, errno.ENOTSUP)


def write_folder(
    target: Path, files: Mapping[str, bytes], *, replace: bool = False, owned: FolderPredicate | None = None
) -> None:
    """Write a folder of these files, in their order, all or nothing; see `stage_folder`."""
    needed = sum(map(len, files.values()))
    with stage_folder(target, replace=replace, owned=owned, needed=needed) as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)


@contextmanager
def stage_folder(
    target: Path, *, replace: bool = False, owned: FolderPredicate | None = None, needed: int = 0
) -> Iterator[Path]:
    """Yield a sibling folder to write into; when the block succeeds, it is synced and replaces the target in one step.

    When the block raises, or the process dies, the target is what it was. What a dead process left behind is removed by
    the next process that writes the same target. Where the file system cannot exchange two folders, replacing takes two
    renames: a process that dies between them leaves the target missing until that next process restores it.

    Args:
        target: the folder to write.
        replace: an existing target may be replaced.
        owned: whether an existing folder is one of ours to replace; an empty folder always is.
        needed: bytes that will be written, for the check of free space.

    Raises:
        StorageError: the target exists, another process is writing it, or the file system fails.
    """
    target = Path(os.path.abspath(target))
    check_output(target, replace=replace, owned=owned)
    with translate_os_errors(target, needed), _create_parents(target), lock_target(target) as lock:
        recover_target(target, lock)
        check_output(target, replace=replace, owned=owned)  # another process may have written it meanwhile
        free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise StorageError(f"{escape_text(target)} needs {needed:,} bytes; {free:,} are free")
        staging = sibling_path(target, "staging")
        staging.mkdir()
        try:
            note_own_folders(lock, staging, target)
            yield staging
            _sync_tree(staging)
            _move_into_place(staging, target, replace=replace)
        finally:
            # It holds an unfinished folder, or the one that was replaced.
            shutil.rmtree(staging, ignore_errors=True)


def write_file(target: Path, data: bytes) -> None:
    """Write a file all or nothing, replacing one that is there; see `stage_file`."""
    write_files({target: data})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files, all of them or none: each is whole beside its target, and on the disk, before the first is replaced.

    Where one cannot be replaced, those before it are put back. A process that dies meanwhile leaves each file old or
    new; so does a failure on a file system that cannot exchange two files.

    Raises:
        StorageError: the file system fails, or a folder is in the place of one.
    """
    with contextlib.ExitStack() as stack:
        staged = {}
        for target, data in files.items():
            target = Path(os.path.abspath(target))
            staged[target] = stack.enter_context(_stage_bytes(target, data))
        if len(staged) > 1:
            _replace_all(staged)
            return
        for target, staging in staged.items():
            with translate_os_errors(target):
                os.replace(staging, target)
                sync_folder(target.parent)


def _replace_all(staged: Mapping[Path, Path]) -> None:
    """Put staged files in the place of their targets; where that fails, put back what was there."""
    with contextlib.ExitStack() as undo:
        for target, staging in staged.items():
            with translate_os_errors(target):
                if not os.path.lexists(target):
                    os.rename(staging, target)
                    undo.callback(os.rename, target, staging)
                elif _try_exchange(staging, target):
                    undo.callback(_try_exchange, staging, target)
                else:
                    os.replace(staging, target)
                sync_folder(target.parent)
        undo.pop_all()
    for staging in staged.values():
        staging.unlink(missing_ok=True)  # what was replaced


@contextmanager
def _stage_bytes(target: Path, data: bytes) -> Iterator[Path]:
    """Yield a file beside a target with these bytes, synced to disk; see `open_staging_file`."""
    check_path(target)
    with translate_os_errors(target, len(data)), open_staging_file(target) as staging:
        if target.is_dir() and not target.is_symlink():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        staging.write_bytes(data)
        _sync_file(staging)
        yield staging


@contextmanager
def stage_file(target: Path, *, needed: int = 0) -> Iterator[Path]:
    """Yield a sibling path with an empty file to write; when the block succeeds, it is synced and becomes the target.

    When the block raises, or the process dies, the target is what it was. What a dead process left behind is removed by
    the next process that writes the same target. Who comes last wins.

    Args:
        target: the file to write.
        needed: bytes that will be written, for the message where the disk is full.

    Raises:
        StorageError: the file system fails; the target is what it was.
    """
    target = Path(os.path.abspath(target))
    check_path(target)
    with translate_os_errors(target, needed), open_staging_file(target) as staging:
        yield staging
        _sync_file(staging)
        os.replace(staging, target)
        sync_folder(target.parent)


@contextmanager
def lock_output(target: Path) -> Iterator[None]:
    """Lock a target against other processes while the block runs, and create the folders above it.

    Raises:
        StorageError: another process holds the lock, or the folder above the target cannot be written to.
    """
    target = Path(os.path.abspath(target))
    with contextlib.ExitStack() as stack:
        with translate_os_errors(target):
            stack.enter_context(_create_parents(target))
            stack.enter_context(lock_target(target))
        yield


def check_output(
    target: Path,
    *,
    replace: bool = False,
    owned: FolderPredicate | None = None,
    inputs: Iterable[str | Path] = (),
) -> None:
    """Check, before any work, that an output does not exist or may be replaced; see `stage_folder`.

    Args:
        inputs: files and folders that are read, which are never replaced, and hub ids.

    Raises:
        StorageError: it exists, or is not a folder, or not one of ours, or is not apart from an input.
    """
    check_path(target)
    refuse_overlap(target, inputs)
    mode = mode_of(target, follow=False)
    if not mode:
        _check_no_file_above(target)
        return
    if not stat.S_ISDIR(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a folder"
        raise StorageError(f"{escape_text(target)} exists and is {kind}", hint="choose another output")
    with translate_os_errors(target):
        if is_empty_folder(target):
            return
        if not replace:
            raise _already_exists_error(target)
        if owned is not None and not owned(target):
            raise StorageError(
                f"{escape_text(target)} holds something else, so it is not replaced", hint="choose another output"
            )


def _check_no_file_above(target: Path) -> None:
    """Raise StorageError where a file stands in the place of one of the folders that a target lies in."""
    above = next((folder for folder in target.absolute().parents if mode_of(folder, follow=True)), None)
    if above is not None and not above.is_dir():
        what = f"{escape_text(target)} cannot be written: {escape_text(above)} is a file, not a folder"
        raise StorageError(what, hint="choose another output")


def _already_exists_error(target: Path) -> StorageError:
    hint = "choose another output, or write over it: replace=True in Python, --replace on the command line"
    return StorageError(f"{escape_text(target)} exists already", hint=hint)


@contextmanager
def _create_parents(target: Path) -> Iterator[None]:
    """Create the folders above a target; those that were missing are removed again when the block raises."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def remove_leftovers(target: Path) -> None:
    """Restore or remove what a process that died has left beside a target.

    Raises:
        StorageError: another process is writing the target, or something of somebody else is in the way.
    """
    with translate_os_errors(target), lock_target(target) as lock:
        recover_target(target, lock)


def _sync_tree(folder: Path) -> None:
    """Sync a folder and everything below it to disk, and give its files the mode that the umask asks for."""
    mode = os.stat(folder).st_mode & 0o666  # created under the umask; safetensors' own writer leaves files 0600
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync_file(Path(parent, name), mode=mode)
        sync_folder(Path(parent))


def _sync_file(path: Path, *, mode: int | None = None) -> None:
    """Sync a file to disk, once it has this mode if one is given."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if mode is not None:
            os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync the entries of a folder to disk, where the file system can do so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _move_into_place(staging: Path, target: Path, *, replace: bool) -> None:
    """Move a finished folder to the target in one step; a folder that was there is then at the staging path.

    A failure undoes the step.
    """
    swap = replace and target.exists() and not is_empty_folder(target)
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
    """Rename a folder; fail where the target is anything but absent or an empty folder."""
    try:
        os.rename(staging, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise _already_exists_error(target) from None
        raise


def _exchange(staging: Path, target: Path) -> None:
    """Swap two folders in one step; in two renames where the file system cannot."""
    if not _try_exchange(staging, target):
        _exchange_in_two(staging, target)


def _try_exchange(one: Path, other: Path) -> bool:
    """Swap two files or folders in one step (Linux `renameat2`); return False where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if renameat2 is not None:
        failed = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
        code = ctypes.get_errno() if failed else 0
    if code and code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code))
    return not code


def _exchange_in_two(staging: Path, target: Path) -> None:
    aside = sibling_path(target, "replaced")
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
