"""What the verbs print: tables, JSON, sizes; nothing in it can steer a terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console
from lora_kit.io.text import escape_for_terminal

_PIPE_WIDTH: Final = 200
"""Columns of a table where there is no terminal to ask."""
_MAIN_METRICS: Final = ("perplexity", "accuracy", "loss", "train_loss", "steps")


def create_console() -> Console:
    from rich.console import Console

    made = Console(markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPE_WIDTH
    return made


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table without lines around it; without a header where that is all empty; nothing where there are no rows."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(header))
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(escape_for_terminal(cell)) for cell in row))
    screen = create_console()
    if screen.is_terminal:
        screen.print(table)
        return
    with screen.capture() as text:
        screen.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def join_words(text: str) -> str:
    return " ".join(text.split())


def flatten_list_message(text: str) -> str:
    """A message and the lines of its list, in one line: `it does not fit: this; that`."""
    head, *items = (line.strip() for line in text.split("\n"))
    return f"{head.removesuffix(':')}: {'; '.join(items)}" if items else head


def abbreviate(value: Any, *, most: int = 300) -> str:
    text = json.dumps(value, default=str) if isinstance(value, (Mapping, list, tuple)) else str(value)
    return text if len(text) <= most else f"{text[:most]}…"


def format_metrics(values: Mapping[str, Any]) -> str:
    """The three that tell most of a record's metrics."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    order = [*(key for key in _MAIN_METRICS if key in numbers), *(key for key in numbers if key not in _MAIN_METRICS)]
    return ", ".join(f"{key} {numbers[key]:.4g}" for key in order[:3])


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def format_size(count: int) -> str:
    """Bytes in powers of 1000."""
    if count < 1000:
        return f"{count} B"
    amount, unit = next(((count / f, u) for f, u in ((1e9, "GB"), (1e6, "MB")) if count >= f), (count / 1e3, "kB"))
    return f"{amount:.1f} {unit}"
