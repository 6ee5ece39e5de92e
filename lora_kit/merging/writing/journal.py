"""What a merge that was killed had finished: whole files and a journal of their digests, beside the output.

A merge that ends, well or not, takes it all away. Only one that died leaves it; the next merge of the same base and
adapters into the same output finds it, reads it back, and goes on after it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import AdapterError, VerificationError
from lora_kit.io.atomic_write import write_file
from lora_kit.io.read import read_json
from lora_kit.io.text import escape_text
from lora_kit.layers.fold import Retention
from lora_kit.merging.writing.hashing_file import FileDigest, hash_on_disk

logger = logging.getLogger(__name__)

_JOURNAL: Final = "journal.json"
_LIMIT: Final = 256 * 2**20


def journal_folder_of(target: Path) -> Path:
    """The folder that is kept for an output."""
    target = Path(os.path.abspath(target))
    return target.with_name(f".{target.name}.kept")


@contextmanager
def keep_finished_files(target: Path, key: str) -> Iterator[FinishedFiles]:
    """Files of an output that are finished before the output is; for who holds its lock.

    Args:
        key: what the files depend on; those of another key are thrown away.
    """
    place = journal_folder_of(target)
    try:
        yield FinishedFiles(place, key)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class FinishedFiles:
    """Finished files of one output, each with what is known of it.

    Attributes:
        folder: where they lie, and where new ones are written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self._files: dict[str, Any] = _read_journal(folder, key)
        if not self._files:
            _remove_path(folder)
            folder.mkdir()

    def finished(self, name: str) -> tuple[FileDigest, list[Retention]] | None:
        """What is known of a file that is there whole; None where it is to be written."""
        try:
            entry = self._files[name]
            facts, retention = dict(entry["facts"]), [Retention(**one) for one in entry["retention"]]
            check_read_back(self.folder / name, facts)
        except (KeyError, TypeError, OSError, VerificationError):
            self._files.pop(name, None)
            (self.folder / name).unlink(missing_ok=True)
            return None
        logger.info("%s was finished before, and is taken up", name)
        return facts, retention

    def finish(
        self, name: str, facts: FileDigest, retention: Sequence[Retention], *, after: Future[None] | None = None
    ) -> None:
        """Read a written file back, and note that it is whole.

        Args:
            after: the end of another call, before which nothing is noted.

        Raises:
            VerificationError: it is not what was written.
        """
        check_read_back(self.folder / name, facts)
        if after is not None:
            after.result()
        self._files[name] = {"facts": facts, "retention": [asdict(one) for one in retention]}
        write_file(self.folder / _JOURNAL, json.dumps({"key": self._key, "files": self._files}).encode())


def check_read_back(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise VerificationError unless a file on the disk has the size and the sha256 it was written with."""
    found, name = hash_on_disk(path), escape_text(path.name)
    if found["size"] != expected["size"]:
        told = f"{name} has {found['size']:,} bytes; {expected['size']:,} were written"
        raise VerificationError(told, hint="is the disk sound?")
    if found["sha256"] != expected["sha256"]:
        raise VerificationError(f"{name} reads back other than it was written", hint="is the disk sound?")


def _read_journal(folder: Path, key: str) -> dict[str, Any]:
    """The files a journal of this key vouches for; none where there is no such journal."""
    if folder.is_symlink() or not folder.is_dir():
        return {}
    try:
        fields = read_json(folder / _JOURNAL, limit=_LIMIT)
    except (AdapterError, OSError):
        return {}
    files = fields.get("files")
    return files if fields.get("key") == key and isinstance(files, dict) else {}


def _remove_path(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
