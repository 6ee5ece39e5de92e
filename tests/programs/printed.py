"""Run the commands that our own files print, as they are printed, with a program's environment on the path."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_BLOCK: Final = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read_block(folder: Path, language: str) -> str:
    """Return the only block of code in a language that the README of a folder has.

    Raises:
        RuntimeError: there is not exactly one.
    """
    text = (folder / "README.md").read_text(encoding="utf-8")
    blocks = [code for name, code in _BLOCK.findall(text) if name == language]
    if len(blocks) != 1:
        raise RuntimeError(f"{folder}/README.md has {len(blocks)} blocks of {language}, not one")
    return blocks[0]


def put_on_path(python: Path, *before: Path) -> Mapping[str, str]:
    """Return this process's variables, with the programs of an environment first on the path.

    Args:
        python: interpreter of the environment.
        before: folders that come before it.
    """
    folders = [*map(str, before), str(python.parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}


def read_version(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
