"""The index of a store: what its adapters are, with the sizes and times of the files that this was read from.

It spares `list` reading every byte of a store again. It is made from the adapters and never the truth: an entry counts
only while every file of the folder has the size and the time that it had, and a missing, damaged or older index is made
anew.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

from lora_kit.errors import LoraKitError
from lora_kit.io.atomic_write import write_file
from lora_kit.io.read import read_text
from lora_kit.io.strict_json import JsonObject
from lora_kit.version import __version__

logger = logging.getLogger(__name__)

INDEX: Final = ".lora_kit_index.json"
"""The name of the file, in the store."""
_FORMAT: Final = 1
_LIMIT: Final = 2**28
_SETTLED_NANOSECONDS: Final = 2_000_000_000
"""Age of the newest file from which on an entry is kept: file systems count time in ticks, so that a change right after
another is not seen by its time."""

FileTimes: TypeAlias = Mapping[str, tuple[int, int]]
"""Size and time of the last change in nanoseconds, by the name of a file; negative where a link leads nowhere."""


def read_file_times(folder: str | os.PathLike[str]) -> dict[str, tuple[int, int]]:
    """Return the size and time of each entry of a folder, which nothing opens; empty where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _read_times(entry) for entry in entries}
    except OSError:
        return {}


def _read_times(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


class StoreIndex:
    """The summaries of a store's adapters, as JSON values, by the names of their folders.

    Args:
        store: the folder.
    """

    def __init__(self, store: Path) -> None:
        self._file = store / INDEX
        self._entries = _read_entries(self._file)
        self._kept: dict[str, JsonObject] = {}

    def find(self, name: str, times: FileTimes) -> JsonObject | None:
        """Return the summary of an adapter; None where there is none of files with these sizes and times."""
        entry = self._entries.get(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("summary"), dict):
            return None
        files, summary = entry.get("files"), entry["summary"]
        return summary if files == {file: list(each) for file, each in times.items()} else None

    def keep(self, name: str, times: FileTimes, summary: JsonObject) -> None:
        """Take a summary into the index that will be written, unless its files were changed just now."""
        newest = max((changed for _, changed in times.values()), default=0)
        if time.time_ns() - newest >= _SETTLED_NANOSECONDS:
            self._kept[name] = {"files": {file: list(each) for file, each in times.items()}, "summary": summary}

    def write(self) -> None:
        """Write what was kept, where that is something else than before.

        A store that cannot be written has no index.
        """
        if self._kept == self._entries:
            return
        content = {"format": _FORMAT, "version": __version__, "adapters": self._kept}
        try:
            write_file(self._file, json.dumps(content, separators=(",", ":")).encode())
        except (LoraKitError, OSError) as error:
            logger.debug("no index of the store: %s", error)


def _read_entries(file: Path) -> dict[str, JsonObject]:
    """Return the entries of an index; empty where there is none that this version has written."""
    try:
        content = json.loads(read_text(file, limit=_LIMIT))
    except (LoraKitError, OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, __version__):
        return {}
    entries = content.get("adapters")
    return entries if isinstance(entries, dict) else {}
