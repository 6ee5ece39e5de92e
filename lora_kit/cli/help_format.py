"""Help as plain text that fits the terminal: each entry filled to its width, and indented where it goes on."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_MAX_WIDTH: Final = 100
"""Columns of the longest line that is easy to read."""


class FilledHelp:
    """A help formatter as cyclopts calls it."""

    def render_usage(self, console: Console, options: ConsoleOptions, usage: object) -> None:
        text = _render_words(console, usage)
        if text:
            _print_wrapped(console, text if text.startswith("Usage:") else f"Usage: {text}", hang=4)
            console.print()

    def render_description(self, console: Console, options: ConsoleOptions, description: object) -> None:
        for paragraph in re.split(r"\n\s*\n", _render_text(console, description)):
            if paragraph.strip():
                _print_wrapped(console, " ".join(paragraph.split()))
                console.print()

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if not panel.entries:
            return
        console.print(f"{panel.title}:", markup=False, highlight=False)
        for entry in panel.entries:
            _print_wrapped(console, f"{_join_names(entry)}: {_describe_entry(console, entry)}", indent=2, hang=6)
        console.print()


def _join_names(entry: HelpEntry) -> str:
    return ", ".join(entry.display_labels_with_metavar or (*entry.positive_names, *entry.positive_shorts))


def _describe_entry(console: Console, entry: HelpEntry) -> str:
    """Return the description of an entry with its default; a flag that is off by default needs none."""
    parts = [_render_words(console, entry.description)]
    if entry.default is not None and str(entry.default) != "False":
        parts.append(f"[default: {entry.default}]")
    if entry.required:
        parts.append("[required]")
    return " ".join(filter(None, parts))


def _render_words(console: Console, content: object) -> str:
    return " ".join(_render_text(console, content).split())


def _render_text(console: Console, content: object) -> str:
    """Return what rich prints for it, as text."""
    with console.capture() as captured:
        console.print(content or "", markup=False, highlight=False)
    return captured.get()


def _print_wrapped(console: Console, text: str, *, indent: int = 0, hang: int = 0) -> None:
    lines = textwrap.wrap(text, min(console.width, _MAX_WIDTH), initial_indent=" " * indent,
                          subsequent_indent=" " * hang,
                          break_long_words=False, break_on_hyphens=False)  # fmt: skip
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
