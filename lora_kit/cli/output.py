"""What the verbs print: tables, JSON, sizes, bars; nothing printed can steer a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lora_kit.cli.text_layout import lay_out_table, wrap_words
from lora_kit.io.text import escape_for_terminal

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH: Final = 200
"""Columns of a table where there is no terminal to ask."""
MAX_READABLE_WIDTH: Final = 120
"""Columns of the longest line of text that is easy to read."""
_MAIN_METRICS: Final = ("perplexity", "accuracy", "loss", "train_loss", "steps")


def create_console(*, stderr: bool = False) -> Console:
    """Return a console for a standard stream that shows text as it is; wide where there is no terminal."""
    from rich.console import Console

    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, spare: Sequence[str] = ()) -> None:
    """Print a table without borders; without a header where that is all empty; nothing where there are no rows.

    Args:
        spare: titles of columns that are left out where the terminal is too narrow, the first one first.
    """
    if not rows:
        return
    screen = create_console()
    shown = [tuple(map(escape_for_terminal, row)) for row in rows]
    lines, heads = lay_out_table(tuple(map(escape_for_terminal, header)), shown, screen.width, spare=spare)
    if screen.is_terminal and heads:
        screen.print("\n".join(lines[:heads]), style="bold", soft_wrap=True)
        lines = lines[heads:]
    print("\n".join(lines))


def print_notice(kind: str, message: str, *, hint: str = "") -> None:
    """Print an error, a warning or a note on stderr.

    On a terminal it is a paragraph wrapped at words, each item of a list in it a line of its own, and the hint the last
    line. Elsewhere it is one line, with the hint in brackets, so that a log can be searched by lines.
    """
    message, hint = escape_for_terminal(message), escape_for_terminal(join_words(hint))
    screen = create_console(stderr=True)
    if not screen.is_terminal:
        print(f"{kind}: {flatten_list_message(message)}" + (f" ({hint})" if hint else ""), file=sys.stderr)
        return
    head, *items = (line.strip() for line in message.split("\n"))
    width = min(screen.width, MAX_READABLE_WIDTH)
    lines = wrap_words(f"{kind}: {head}", width)
    lines += [line for item in items for line in wrap_words(item, width, indent="  - ", hang="    ")]
    lines += wrap_words(f"hint: {hint}", width, hang="  ") if hint else []
    print("\n".join(lines), file=sys.stderr)


def print_text(text: str) -> None:
    """Print text, with nothing in it that steers a terminal."""
    print(escape_for_terminal(text))


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def print_if(shown: bool) -> Iterator[None]:
    """Print what the block prints on standard output, or nothing of it: another process prints the same."""
    if shown:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def join_words(text: str) -> str:
    """Return the text on one line."""
    return " ".join(text.split())


def flatten_list_message(text: str) -> str:
    """Return a message and the lines of its list as one line: `it does not match: this; that`."""
    head, *items = (line.strip() for line in text.split("\n"))
    return f"{head.removesuffix(':')}: {'; '.join(items)}" if items else head


def abbreviate(value: object, *, max_length: int = 300) -> str:
    """Return a value as JSON or text, cut where it is long."""
    text = json.dumps(value, default=str) if isinstance(value, (Mapping, list, tuple)) else str(value)
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def format_metrics(values: Mapping[str, object]) -> str:
    """Return the three most informative metrics of a record as text."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    order = [*(key for key in _MAIN_METRICS if key in numbers), *(key for key in numbers if key not in _MAIN_METRICS)]
    return ", ".join(f"{key} {numbers[key]:.4g}" for key in order[:3])


def format_number(value: float | None) -> str:
    """Return a number as text; empty for None."""
    return "" if value is None else f"{value:g}"


def format_size(count: int) -> str:
    """Return bytes as text, in powers of 1000."""
    if count < 1000:
        return f"{count} B"
    amount, unit = next(((count / f, u) for f, u in ((1e9, "GB"), (1e6, "MB")) if count >= f), (count / 1e3, "kB"))
    return f"{amount:.1f} {unit}"


@contextlib.contextmanager
def show_bytes_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with bytes per second on stderr, where that is a terminal; yield what updates it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
