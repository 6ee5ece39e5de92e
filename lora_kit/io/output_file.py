"""A file that a command shall write: checked before any work."""

from __future__ import annotations

import os
from pathlib import Path

from lora_kit.errors import StorageError
from lora_kit.io.text import escape_text


def check_output_file(path: Path, *, replace: bool) -> None:
    """Check that a file can be written: before hours of work, not after.

    Raises:
        StorageError: the file exists, or its folder does not.
    """
    if path.is_dir():
        raise StorageError(f"{escape_text(path)} is a folder", hint="predictions are written to one file")
    if path.exists() and not (replace and path.is_file()):
        raise StorageError(f"{escape_text(path)} exists", hint="--replace replaces it")
    if not path.parent.is_dir():
        raise StorageError(f"{escape_text(path.parent)} is not a folder, so {escape_text(path)} cannot be written")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{escape_text(path)} cannot be written: {escape_text(path.parent)} may not be written to")
