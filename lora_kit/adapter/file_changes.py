"""Whether the files of an adapter's folder are the ones that they were: for reading what somebody may be writing."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter_record import RECORD
from lora_kit.adapter.folder import CONFIG, OLD_WEIGHTS, WEIGHTS

_SETTLING_ATTEMPTS: Final = 20
_TICK_NANOSECONDS: Final = 20_000_000


def identify_files(folder: Path) -> tuple[tuple[int, ...] | None, ...]:
    """Return what changes with a folder and each of its files: device, inode, size and times; None where one is not."""
    return tuple(
        _identify_file(path) for path in (folder, *(folder / name for name in (CONFIG, WEIGHTS, OLD_WEIGHTS, RECORD)))
    )


def _identify_file(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if stat.S_ISDIR(status.st_mode):  # further files in it do not matter
        return status.st_dev, status.st_ino
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def wait_until_settled(folder: Path) -> tuple[tuple[int, ...] | None, ...]:
    """Return what identifies the files, once none was changed in the last moments.

    File systems count time in ticks of some milliseconds: a change within the same tick as the one before is not seen.
    A folder with a record does not wait.
    """
    identity = identify_files(folder)
    for _ in range(_SETTLING_ATTEMPTS):
        newest = max((file[-1] for file in identity if file is not None and len(file) > 2), default=0)
        age = time.time_ns() - newest
        if identity[-1] is not None or not 0 <= age < _TICK_NANOSECONDS:
            break
        time.sleep((_TICK_NANOSECONDS - age) / 1e9)
        identity = identify_files(folder)
    return identity
