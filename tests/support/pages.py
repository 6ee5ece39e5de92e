"""The documents as tests read them: their code, their commands, their links, and what stands in backticks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "adapters/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GUIDES: Final = [page for page in PAGES if page.parent.name == "how-to" or page.name == "first-hour.md"]
"""Pages to be followed from top to bottom: what a step makes, the next one needs."""
NOT_RUN: Final = "no-run"
"""A word behind a fence's language: this code needs a network, a device or minutes. It is read, not run."""

_FENCE = re.compile(r"^```(?P<info>\S[^\n]*)?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """Fenced code of a page.

    Attributes:
        page: where it stands. line: of its fence, from 1.
        language: the first word behind the fence. marks: the others.
    """

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    code: str

    @property
    def runs(self) -> bool:
        return NOT_RUN not in self.marks

    @property
    def file(self) -> str | None:
        """The file that the block shows: a mark with a dot in it, as in ```csv tickets.csv."""
        return next((mark for mark in self.marks if "." in mark), None)

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages; all of them where none is named."""
    text, found = page.read_text("utf-8"), []
    for match in _FENCE.finditer(text):
        language, *marks = (match["info"] or "").split() or [""]
        if not languages or language in languages:
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, language, tuple(marks), match["code"]))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text("utf-8"))


def spans(page: Path) -> list[str]:
    """What stands in backticks in the prose of a page, on one line each."""
    return [" ".join(match.split()) for match in _SPAN.findall(prose(page))]


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block of shell, comments taken out, `&&` apart."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def links(page: Path) -> list[str]:
    """Where the links of a page lead."""
    return _LINK.findall(_SPAN.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page in links to them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(page)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        taken = [f"{slug}-{number}" for number in range(1, 100) if f"{slug}-{number}" not in found]
        found.add(slug if slug not in found else taken[0])
    return found
