"""A file that a command shall write: checked before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lora_kit.errors import StorageError
from lora_kit.io.output_overlap import OTHER_OUTPUT, refuse_overlap
from lora_kit.io.output_path import check_path
from lora_kit.io.text import escape_text


def check_output_file(path: Path, *, replace: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Check that a file can be written: before hours of work, not after.

    Args:
        inputs: files and folders that are read, which are never replaced or written into.

    Raises:
        StorageError: the file exists, is an input under any name or lies in one, or its folder does not exist.
    """
    check_path(path)
    refuse_overlap(path, inputs)
    if path.is_dir():
        raise StorageError(f"{escape_text(path)} is a folder", hint="predictions are written to one file")
    if path.exists() and not path.is_file():
        raise StorageError(f"{escape_text(path)} exists, and is no file that can be replaced", hint=OTHER_OUTPUT)
    if path.exists() and not replace:
        raise StorageError(f"{escape_text(path)} exists", hint="--replace replaces it")
    if not path.parent.is_dir():
        raise StorageError(f"{escape_text(path.parent)} is not a folder, so {escape_text(path)} cannot be written")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{escape_text(path)} cannot be written: {escape_text(path.parent)} may not be written to")
