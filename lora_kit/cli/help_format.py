"""Help as plain text that fits the terminal: names in one column, what they do beside them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from lora_kit.cli.output import MAX_READABLE_WIDTH
from lora_kit.cli.text_layout import measure_width, wrap_words

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_MAX_NAME_WIDTH: Final = 24
"""Columns of the longest name that has its description on the same line."""
_INDENT: Final = "  "
EXAMPLE: Final = "Example: "
"""What the paragraph of a docstring begins with that is one line to type."""


class FilledHelp:
    """A help formatter as cyclopts calls it."""

    def render_usage(self, console: Console, options: ConsoleOptions, usage: object) -> None:
        text = _render_words(console, usage)
        if text:
            usage = text if text.startswith("Usage:") else f"Usage: {text}"
            print_lines(console, [*wrap_words(usage, readable_width(), hang="    "), ""])

    def render_description(self, console: Console, options: ConsoleOptions, description: object) -> None:
        for paragraph in re.split(r"\n\s*\n", _render_text(console, description)):
            text = " ".join(paragraph.split())
            if text.startswith(EXAMPLE):
                print_lines(console, [EXAMPLE.strip(), f"{_INDENT}{text.removeprefix(EXAMPLE)}", ""])
            elif text:
                print_lines(console, [*wrap_words(text, readable_width()), ""])

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        entries = [(_join_names(entry), _describe_entry(console, entry)) for entry in panel.entries]
        if entries:
            print_lines(console, [f"{panel.title}:", *lay_out_entries(entries, readable_width()), ""])


def lay_out_entries(entries: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Return names with their descriptions beside them, in lines of at most `width` columns.

    A name that is too long for its column has a line of its own.
    """
    column = min(_MAX_NAME_WIDTH, max(measure_width(name) for name, _ in entries))
    hang = _INDENT + " " * (column + len(_INDENT))
    lines = list[str]()
    for name, description in entries:
        if measure_width(name) <= column:
            lines += wrap_words(description, width, indent=f"{_INDENT}{name:{column}}{_INDENT}", hang=hang)
        else:
            lines += [_INDENT + name, *wrap_words(description, width, indent=hang, hang=hang)]
    return [line.rstrip() for line in lines]


def readable_width() -> int:
    """Return the columns that help may take: those of the terminal as it is now, which cyclopts measures only once."""
    from rich.console import Console

    return min(Console().width, MAX_READABLE_WIDTH)


def _join_names(entry: HelpEntry) -> str:
    return ", ".join(entry.display_labels_with_metavar or (*entry.positive_names, *entry.positive_shorts))


def _describe_entry(console: Console, entry: HelpEntry) -> str:
    """Return the description of an entry with its default; a flag that is off by default needs none."""
    parts = [_render_words(console, entry.description)]
    if entry.default is not None and str(entry.default) not in ("False", ""):
        parts.append(f"[default: {entry.default}]")
    if entry.required:
        parts.append("[required]")
    return " ".join(filter(None, parts))


def _render_words(console: Console, content: object) -> str:
    return " ".join(_render_text(console, content).split())


def _render_text(console: Console, content: object) -> str:
    """Return what rich prints for it, as text."""
    from rich.console import Console

    # One of its own: what somebody printed to the other a moment ago may still be in its buffer.
    own = Console(file=io.StringIO(), width=console.width)
    with own.capture() as captured:
        own.print(content or "", markup=False, highlight=False)
    return captured.get()


def print_lines(console: Console, lines: Sequence[str]) -> None:
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
