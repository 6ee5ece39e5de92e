"""The names of the files in an adapter's folder, and what makes a folder an adapter. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter_record import RECORD
from lora_kit.io.read import exists

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
OLD_WEIGHTS: Final = "adapter_model.bin"
CARD: Final = "README.md"


ADAPTER_FILES: Final = frozenset({CONFIG, WEIGHTS, OLD_WEIGHTS})
"""A folder with one of these is an adapter."""


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder has the config or the record of an adapter."""
    return (folder / CONFIG).is_file() or (folder / RECORD).is_file()


def has_adapter_files(folder: Path) -> bool:
    """Return whether a folder has the config or the weights of an adapter; a link that leads nowhere counts."""
    return any(exists(folder / name) for name in ADAPTER_FILES)


def list_adapter_subfolders(folder: Path) -> list[Path]:
    """Return the folders directly in a folder that hold an adapter, by name; none where it cannot be read."""
    try:
        return [entry for entry in sorted(folder.iterdir()) if has_adapter_files(entry)]
    except (OSError, ValueError):  # ValueError: a NUL
        return []
