"""The version of the package; records and `--version` name it."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
