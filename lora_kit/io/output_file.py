"""A file that a command shall write: checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from lora_kit.errors import StorageError
from lora_kit.io.text import escape_text


def check_output_file(path: Path, *, replace: bool, source: Path | None = None) -> None:
    """Check that a file can be written: before hours of work, not after.

    Args:
        source: a file that is read, which is never replaced.

    Raises:
        StorageError: the file exists, is the source under any name, or its folder does not exist.
    """
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        what = f"{escape_text(path)} is the file that is read ({escape_text(source)})"
        raise StorageError(what, hint="choose another file for the output")
    if path.is_dir():
        raise StorageError(f"{escape_text(path)} is a folder", hint="predictions are written to one file")
    if path.exists() and not (replace and path.is_file()):
        raise StorageError(f"{escape_text(path)} exists", hint="--replace replaces it")
    if not path.parent.is_dir():
        raise StorageError(f"{escape_text(path.parent)} is not a folder, so {escape_text(path)} cannot be written")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{escape_text(path)} cannot be written: {escape_text(path.parent)} may not be written to")
