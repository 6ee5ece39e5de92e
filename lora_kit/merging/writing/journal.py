"""The files that a killed merge had finished, with a journal of their digests, in a folder beside the output.

A merge removes this folder when it succeeds or fails. Only a killed one leaves it; the next merge of the same base and
adapters into the same output reads the finished files back and writes the others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import AdapterError, StorageError, VerificationError
from lora_kit.io.atomic_write import write_file
from lora_kit.io.output_lock import is_staging_file, remove_folder
from lora_kit.io.read import exists, read_json
from lora_kit.io.text import escape_text
from lora_kit.layers.fold import Retention
from lora_kit.merging.writing.hashing_file import FileDigest, hash_on_disk

logger = logging.getLogger(__name__)

_JOURNAL: Final = "journal.json"
_LIMIT: Final = 256 * 2**20


def journal_folder_of(target: Path) -> Path:
    """Return the folder of the finished files of an output."""
    target = Path(os.path.abspath(target))
    return target.with_name(f".{target.name}.kept")


@contextlib.contextmanager
def keep_finished_files(target: Path, key: str) -> Iterator[FinishedFiles]:
    """Yield the finished files of an output, and remove them at the end. The caller holds the lock of the output.

    Args:
        target: the output.
        key: a digest of what the files depend on; files of another key are removed.
    """
    folder = journal_folder_of(target)
    finished = FinishedFiles(folder, key)
    try:
        yield finished
    finally:
        with contextlib.suppress(OSError):
            remove_folder(folder, last=[_JOURNAL])


class FinishedFiles:
    """The finished files of one output, each with its digest and what survived in it.

    Attributes:
        folder: of these files; new ones are written into it.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self._files: dict[str, Any] = _read_journal(folder, key)
        if not self._files:
            _remove_folder(folder)
            folder.mkdir()
            self._write_journal()  # from now on the folder is seen to be of a merge

    def find(self, name: str) -> tuple[FileDigest, list[Retention]] | None:
        """Return the digest of a finished file and what survived in it; None where it must be written."""
        try:
            entry = self._files[name]
            digest = FileDigest(size=entry["facts"]["size"], sha256=entry["facts"]["sha256"])
            retention = [Retention(**one) for one in entry["retention"]]
            check_read_back(self.folder / name, digest)
        except (KeyError, TypeError, OSError, VerificationError):
            self._files.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)
            return None
        logger.info("%s was finished by an earlier merge, and is used", name)
        return digest, retention

    def finish(
        self, name: str, digest: FileDigest, retention: Sequence[Retention], *, after: Future[None] | None = None
    ) -> None:
        """Read a written file back and record it in the journal.

        Args:
            name: of the file.
            digest: of the bytes that were written.
            retention: what survived of each delta in it.
            after: an earlier call, which must end before this one records anything.

        Raises:
            VerificationError: the file is not what was written.
        """
        check_read_back(self.folder / name, digest)
        if after is not None:
            after.result()
        self._files[name] = {"facts": digest, "retention": [asdict(one) for one in retention]}
        self._write_journal()

    def _write_journal(self) -> None:
        write_file(self.folder / _JOURNAL, json.dumps({"key": self._key, "files": self._files}).encode())


def check_read_back(path: Path, expected: FileDigest) -> None:
    """Raise VerificationError unless a file on the disk has the size and sha256 it was written with."""
    size, name = path.stat().st_size, escape_text(path.name)
    if size != expected["size"]:
        message = f"{name} has {size:,} bytes; {expected['size']:,} were written"
        raise VerificationError(message, hint="check the disk")
    if hash_on_disk(path)["sha256"] != expected["sha256"]:
        raise VerificationError(f"{name} was read back with other bytes than were written", hint="check the disk")


def _read_journal(folder: Path, key: str) -> dict[str, object]:
    """Return the files that a journal with this key lists; none without such a journal."""
    if folder.is_symlink() or not folder.is_dir():
        return {}
    try:
        fields = read_json(folder / _JOURNAL, limit=_LIMIT)
    except (AdapterError, OSError):
        return {}
    files = fields.get("files")
    return files if fields.get("key") == key and isinstance(files, dict) else {}


def _remove_folder(path: Path) -> None:
    """Remove the folder that another merge left.

    Raises:
        StorageError: it is not of a merge.
    """
    if path.is_symlink():
        path.unlink()
    if not os.path.lexists(path):
        return
    is_folder = path.is_dir()
    names = os.listdir(path) if is_folder else []
    strangers = [name for name in names if not is_staging_file(name, path / _JOURNAL)]
    if not is_folder or (strangers and not exists(path / _JOURNAL)):
        what = f"{escape_text(path)} is in the way, and is not of lora_kit"
        raise StorageError(what, hint="move it, or choose another output")
    remove_folder(path, last=[_JOURNAL])
