"""Hooks of mkdocs, named in mkdocs.yml: what makes a site of documents that are written to be read in the repository.

The navigation is the index docs/README.md. What the documents link to outside of docs/ (the pages of other folders,
pictures, sources) becomes part of the site under `repository/`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
OUTSIDE: Final = "repository/"
"""Where files from outside of docs/ stand in the site."""

_LINK: Final = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
_FILE: Final = re.compile(r"^(```\w+) ([\w-]+\.\w+)$", re.MULTILINE)
_MARKS: Final = re.compile(r"^(```\w+) [\w -]+$", re.MULTILINE)
_CODE: Final = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_COMMENT: Final = re.compile(r"^<!--[^\n]*-->$", re.MULTILINE)
_HEADING: Final = re.compile(r"## (.+)")
_ROW: Final = re.compile(r"\| \[([^]]+)\]\(([^)]+)\) \|")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read the navigation from the index: a section for each heading, a page for each row that begins with a link."""
    sections: list[dict[str, Any]] = [{"Home": "README.md"}]
    for line in (DOCS / "README.md").read_text("utf-8").splitlines():
        if heading := _HEADING.fullmatch(line):
            sections.append({heading[1]: []})
        elif row := _ROW.match(line):
            pages = next(iter(sections[-1].values()))
            pages.append({row[1][0].upper() + row[1][1:]: site_path((DOCS / row[2]).resolve())})
    config.nav = sections
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that the documents link to, and those that these link to."""
    unread = [DOCS / file.src_uri for file in files.documentation_pages()]
    while unread:
        page = unread.pop()
        for path in linked_files(page):
            if site_path(path) not in files.src_uris:
                made = File.generated(
                    config, site_path(path), abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV
                )
                files.append(made)
                unread += [path] if path.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site; take out what only tests and generators read."""
    here = Path(page.file.abs_src_path or "")

    def relink(match: re.Match[str]) -> str:
        target = (here.parent / match[2]).resolve()
        if not target.is_file():
            return match[0] if not target.is_dir() else match[1] + "#" + match[4]
        path = os.path.relpath(site_path(target), Path(page.file.src_uri).parent)
        return f"{match[1]}{Path(path).as_posix()}{match[3] or ''}{match[4]}"

    parts = _CODE.split(_FILE.sub(r'\1 title="\2"', _MARKS.sub(r"\1", _COMMENT.sub("", markdown))))
    return "".join(part if part.startswith("`") else _LINK.sub(relink, part) for part in parts)


def site_path(path: Path) -> str:
    """Return where a file of the repository stands in the site."""
    inside = path.is_relative_to(DOCS)
    return path.relative_to(DOCS).as_posix() if inside else OUTSIDE + path.relative_to(ROOT).as_posix()


def linked_files(page: Path) -> list[Path]:
    """Return the files of the repository, outside of docs/, that a document links to."""
    prose = _CODE.sub("", page.read_text("utf-8"))
    targets = [(page.parent / match[2]).resolve() for match in _LINK.finditer(prose)]
    return [path for path in targets if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)]
