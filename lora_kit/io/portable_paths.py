"""Paths as they are written into files that travel with an adapter or a model.

Whoever receives such a file learns no name of a home folder, and nothing of folders outside the project: the working
directory of the process that wrote it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_HOMES: Final = (Path("/home"), Path("/Users"), Path("/root"))
"""Folders with the homes of people, on systems that this runs on; `/root` is one itself."""


def make_path_portable(path: str) -> str:
    """Return a path as others read it: inside the working directory relative to it, else its name alone.

    What is neither absolute nor leads out of the working directory, such as an id of the hub, is returned as it is.
    """
    if not _leads_outside(path):
        return path
    full = _absolute(path)
    return _relative_to_project(full) or full.name


def make_folder_portable(base: str) -> str:
    """Return the name of a base as others read it: in the user's home as `~/…`, in that of another its last part.

    A folder that is in no home, such as `/models/llama`, keeps its path, so that the base is found again.
    """
    if not _leads_outside(base):
        return base
    full, home = _absolute(base), Path.home()
    inside = _relative_to_project(full)
    if inside:
        return inside
    if full.is_relative_to(home) and home != Path("/"):
        return str(Path("~", full.relative_to(home)))
    if any(full.is_relative_to(homes) for homes in _HOMES):
        return full.name
    return str(full) if base.startswith(("/", "~")) else base  # the label of somebody else, perhaps


def find_private_path(text: str) -> str | None:
    """Return the first path in a text that names a home folder, this user's or anyone's; None without one."""
    home = str(Path.home())
    patterns = [rf"{re.escape(str(homes))}/[^/\s\"'`]+" for homes in _HOMES[:2]]
    patterns += [r"[A-Za-z]:\\{1,2}Users\\{1,2}\w+", r"(?<![\w.])~/\S+"]
    patterns += [rf"(?<![\w.]){re.escape(home)}(?![\w.-])"] if home != "/" else []
    found = re.search(rf"(?:{'|'.join(patterns)})[^\s\"'`]*", text)
    return found[0] if found else None


def _leads_outside(path: str) -> bool:
    """Return whether a path is absolute, begins in a home, or climbs out of the working directory."""
    return path.startswith(("/", "~")) or os.path.normpath(path).startswith("..")


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _relative_to_project(full: Path) -> str:
    """Return a path relative to the working directory; an empty string where it is not in it, or where that is `/`."""
    project = Path.cwd()
    is_inside = full.is_relative_to(project) and project != Path("/")
    return str(full.relative_to(project)) if is_inside else ""
