"""The documentation as a site: it builds without a warning, its links lead somewhere, all it loads is its own."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.pages import ROOT, name_of

pytest.importorskip("material", reason="needs the extra docs")

from mkdocs.commands.build import build
from mkdocs.config import load_config

LOADED = {"img": "src", "link": "href", "script": "src"}
"""What a browser reads by itself."""


class Document(HTMLParser):
    """What a page of the site has: `ids` to link to, `links` that people follow, `loaded` files, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        loaded = found.get(LOADED.get(tag, ""))
        self.loaded += [loaded] if loaded and found.get("rel") not in ("next", "prev", "canonical") else []

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Document]:
    """The pages of the site by their path; `strict` makes every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return {page: Document(page.read_text("utf-8")) for page in sorted(folder.rglob("*.html"))}


def test_the_site_has_every_page_of_the_documentation(site: dict[Path, Document]) -> None:
    folder = min(site, key=lambda page: len(page.parts)).parent
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    shown = {page.relative_to(folder) for page in site}
    assert not {Path(str(path).replace("README", "index")) for path in written} - shown
    assert Path("repository/adapters/index.html") in shown


def test_every_link_of_the_site_leads_to_a_file_and_an_anchor(site: dict[Path, Document]) -> None:
    dead = []
    for page, document in site.items():
        for link in (urlsplit(one) for one in document.links if page.name != "404.html"):
            target = (page.parent / unquote(link.path)).resolve() if link.path else page
            missing = link.fragment and target in site and unquote(link.fragment) not in site[target].ids
            if not link.scheme and (missing or not target.is_file()):
                dead.append(f"{page.name}: {link.geturl()}")
    assert not dead


def test_a_browser_loads_nothing_from_elsewhere(site: dict[Path, Document]) -> None:
    loaded = {link for document in site.values() for link in document.loaded}
    assert len(loaded) > 2
    assert not {link for link in loaded if urlsplit(link).netloc}
    folder = min(site, key=lambda page: len(page.parts)).parent
    sheets = [sheet.read_text("utf-8") for sheet in folder.rglob("*.css")]
    assert not [url for sheet in sheets for url in re.findall(r"(?:url\(|@import)\s*['\"]?(https?:[^'\")]+)", sheet)]


def test_fences_tables_and_lists_are_rendered(site: dict[Path, Document]) -> None:
    """What code hosts render and this renderer reads as text: marked fences, rows, items without an empty line."""
    raw = re.compile(r"```|\|---|^\s*[-*] \*\*", re.MULTILINE)
    assert not {page.name: found[0] for page, document in site.items() if (found := raw.search(document.text))}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_lists_stand_after_an_empty_line(page: Path) -> None:
    """Code hosts take a list that follows a line of text at once; the renderer of the site does not."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    paragraphs = [block.splitlines() for block in re.split(r"\n\s*\n", text)]
    items = re.compile(r"(?:[-*]|1\.) ")
    assert not [line for lines in paragraphs if not items.match(lines[0].strip() if lines else "")
                for line in lines[1:] if items.match(line)]  # fmt: skip
