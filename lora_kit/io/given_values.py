"""Arguments of public functions, checked before anything is done with them."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TypeGuard

from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value


def parse_path(value: object, *, name: str) -> Path:
    """Return an argument that is a path, as text or as a path; raise ConfigError for any other."""
    if not isinstance(value, (str, os.PathLike)) or isinstance(value, bytes):
        raise ConfigError(f"{name} must be a path; {format_value(value)} was given")
    return Path(value)


def is_name_collection(value: object) -> TypeGuard[Collection[str]]:
    """Return whether an argument is a list, set or the like of texts, and not a text itself."""
    return (
        isinstance(value, Collection) and not isinstance(value, (str, bytes)) and all(isinstance(x, str) for x in value)
    )
