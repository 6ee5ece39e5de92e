"""One self-contained page of HTML: no network, no script, all text escaped; for screens, phones, the dark and paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

_CONTENT_SECURITY_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
"""Forbids a browser to fetch anything for this page, whatever its text is."""
PALETTE: Final = Path(__file__).with_name("palette.css")
"""The colors of pages that are served, as a style sheet."""
_SHORT: Final = ' class="short"'
"""Of a cell that is not broken into lines."""
_MOST_ROWS: Final = 30
"""Rows of a table that is not scrolled on a screen."""
NO_PLOTS: Final = "Without pictures: matplotlib is not installed (pip install 'lora-kit[plot]')."


class Fact(NamedTuple):
    """A figure at the head of a page: its name, its value, and a remark."""

    title: str
    value: str
    note: str = ""


class Markup(str):
    """Text that is HTML already: it is not escaped again."""

    __slots__ = ()


def render_page(title: str, lead: str, parts: Iterable[str], *, summary: str = "") -> str:
    """Return a page.

    Args:
        title: of the page, and its heading.
        lead: a line below the heading.
        parts: HTML, in order; empty ones are left out.
        summary: the result in a sentence or two.
    """
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("lora-kit", "torch", "transformers"))
    said = f'<p class="summary">{escape_html(summary)}</p>' if summary else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_make_visible(title)}</title><style>\n{style}</style></head>\n<body><main>\n"
        f'<header><h1>{escape_html(title)}</h1><p class="lead">{escape_html(lead)}</p>{said}</header>\n'
        + "\n".join(part for part in parts if part)
        + f"\n<footer>{escape_html(versions)}</footer>\n</main></body></html>\n"
    )


def escape_html(value: object) -> str:
    """Return a value as text of a page: escaped, control characters made visible, its writing direction isolated."""
    if isinstance(value, Markup):
        return value
    visible = _make_visible(value)
    return visible if visible.isascii() else f"<bdi>{visible}</bdi>"


def _make_visible(value: object) -> str:
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return escape("".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def render_section(title: str, *parts: str, note: str = "") -> str:
    """Return a section with a heading; empty where all its parts are."""
    body = "".join(parts)
    if not body:
        return ""
    said = f'<p class="note">{escape_html(note)}</p>' if note else ""
    return f"<section><h2>{escape_html(title)}</h2>{said}{body}</section>"


def render_facts(facts: Iterable[Fact]) -> str:
    """Return figures as cards."""
    cells = (
        f"<div><dt>{escape_html(fact.title)}</dt>"
        f"<dd>{escape_html(fact.value)}<small>{escape_html(fact.note)}</small></dd></div>"
        for fact in facts
    )
    return f'<dl class="facts">{"".join(cells)}</dl>'


def render_events(events: Sequence[str]) -> str:
    """Return what interrupted or changed something as a list; empty where nothing did."""
    items = "".join(f"<li>{escape_html(event)}</li>" for event in events)
    return f'<ul class="events">{items}</ul>' if items else ""


def render_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = False, marked: int | None = None
) -> str:
    """Return a table, which scrolls on a screen where it is long; empty without rows.

    On a narrow screen the cells of a row stand below one another, each with its name, unless they are numbers or there
    are only two columns.

    Args:
        header: names of the columns; the first one names the rows.
        numbers: whether all columns but the first hold numbers, which stand below one another on any screen.
        marked: index of a row that stands out.
    """
    lines = []
    for number, row in enumerate(rows):
        cells = (
            f'<td data-name="{_make_visible(name)}"{_SHORT if len(str(cell)) <= 8 else ""}>{_let_break(cell)}</td>'
            for name, cell in zip(header, row, strict=True)
        )
        lines.append(f"<tr{' class=marked' if number == marked else ''}>{''.join(cells)}</tr>")
    if not lines:
        return ""
    heads = "".join(f"<th>{escape_html(name)}</th>" for name in header)
    kind = "numbers" if numbers else "pairs" if len(header) == 2 else "texts"
    size = "wide tall" if len(lines) > _MOST_ROWS else "wide"
    return (
        f'<div class="{size}"><table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _let_break(cell: object) -> str:
    """Return a cell as HTML that breaks a long name, such as that of a label, after an underscore first."""
    text = escape_html(cell)
    return text if isinstance(cell, Markup) else re.sub(r"(?<=\w)_(?=\w)", "_<wbr/>", text)


def render_code(*blocks: str) -> str:
    """Return blocks of code."""
    return "".join(f"<pre><code>{escape_html(block)}</code></pre>" for block in blocks)


def render_charts(charts: Sequence[str]) -> str:
    """Return figures beside one another."""
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def format_figure(value: float) -> str:
    """Return a number in four digits."""
    return f"{value:.4g}"
