"""What the verbs print: tables, JSON, sizes, bars; nothing printed can steer a terminal."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lora_kit.io.text import escape_for_terminal

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH: Final = 200
"""Columns of a table where there is no terminal to ask."""
_LONG_TABLE: Final = 500
"""Rows from which on a table that is not for a terminal is laid out plainly."""
_MAIN_METRICS: Final = ("perplexity", "accuracy", "loss", "train_loss", "steps")


def create_console() -> Console:
    """Return a console for standard output that shows text as it is; wide where there is no terminal."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table without borders; without a header where that is all empty; nothing where there are no rows."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    screen = create_console()
    shown = [tuple(map(escape_for_terminal, row)) for row in rows]
    if not screen.is_terminal and len(rows) > _LONG_TABLE and not any("\n" in cell for row in shown for cell in row):
        _print_long_table(header, shown)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(header))
    for title in header:
        table.add_column(title, overflow="fold")
    for row in shown:
        table.add_row(*map(Text, row))
    if screen.is_terminal:
        screen.print(table)
        return
    with screen.capture() as text:
        screen.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def _print_long_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table whose lines are as long as they need to be: rich takes a millisecond for each row."""
    from rich.cells import cell_len

    def measure(cell: str) -> int:
        return len(cell) if cell.isascii() else cell_len(cell)

    lines = [header, *rows] if any(header) else rows
    columns = [
        [cell + " " * (width - size) for cell, size in zip(column, sizes, strict=True)]
        for column, sizes in ((column, list(map(measure, column))) for column in zip(*lines, strict=True))
        for width in [max(sizes)]
    ]
    print("\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True)))


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
