"""Whether a path can be the one of an output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from lora_kit.errors import StorageError
from lora_kit.io.text import format_value

_MAX_PART_BYTES: Final = 255
_MAX_NAME_BYTES: Final = 220
"""Bytes of an output's name: `.<name>.run.lock` and the like have to be names as well."""
_MAX_PATH_BYTES: Final = 4_000


def check_path(target: Path) -> None:
    """Raise StorageError for a path that no file system accepts."""
    reason = reason_not_a_path(target)
    if reason:
        raise StorageError(f"{format_value(str(target))} {reason}", hint="choose another output")


def reason_not_a_path(target: Path) -> str:
    """Return why no file system takes an output, with the names that are written beside it; else an empty string."""
    text = str(target)
    if "\0" in text:
        return "is not a path"
    try:
        sizes = [len(os.fsencode(part)) for part in target.parts]
    except UnicodeEncodeError:
        return "is not a path"
    if sizes and sizes[-1] > _MAX_NAME_BYTES:
        return f"has a name of {sizes[-1]:,} bytes; at most {_MAX_NAME_BYTES} leave room for the names beside it"
    if max(sizes, default=0) > _MAX_PART_BYTES or len(os.fsencode(text)) > _MAX_PATH_BYTES:
        return f"is longer than a path can be ({_MAX_PATH_BYTES:,} bytes, {_MAX_PART_BYTES} for each part)"
    return ""
