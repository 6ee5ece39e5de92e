"""What the demo prints; plain lines where there is no terminal."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lora_kit.demo.demo_report import DemoReport, MixedRow, TaskResult
from lora_kit.io.text import escape_text
from lora_kit.merging.merge_report import MergeReport

_PIPE_WIDTH = 120
"""Columns where there is no terminal to ask."""
_ROWS_SHOWN = 2
"""Held-out rows shown per task."""
_CELL_LENGTH = 90


class DemoScreen:
    """The demo on a console, step by step."""

    def __init__(self, console: Console | None = None) -> None:
        width = None if os.isatty(1) or "COLUMNS" in os.environ else _PIPE_WIDTH
        self._console = console or Console(markup=False, highlight=False, emoji=False, width=width)

    def show_opening(self, *, parameters: int, tasks: int) -> None:
        """Print what is about to happen."""
        self._print(
            f"{tasks} adapters on one frozen base",
            f"kit-base: {parameters / 1e6:.1f} M parameters. It writes children's-book English and knows no "
            "instructions; each adapter teaches it one task. No prompt below was in the training data.",
        )

    def show_task(self, result: TaskResult) -> None:
        """Print a training, a few answers of base and adapter, and their scores."""
        report, name = result.training, result.task.name
        texts = (map(str, answers.said) for answers in result.answers.results)
        self._print(
            f"{name}: {result.task.summary}",
            f"{report.steps} steps in {report.seconds:.1f} s ({report.tokens_per_second:,.0f} tokens/s); "
            f"{report.trainable:,} parameters, {100 * report.trainable / report.parameters:.1f} % of the model",
            _build_table(("prompt", "base", name), list(zip(result.prompts, *texts, strict=True))[:_ROWS_SHOWN]),
            f"right on {result.answers.rows} held-out prompts: base {result.base_score:.0%}, "
            f"adapter {result.score:.0%}",
        )

    def show_swaps(self, count: int, seconds: float, names: Sequence[str]) -> None:
        """Print what a swap takes."""
        self._print(
            "swap adapters in the running model",
            f"{count:,} swaps between {', '.join(names)} and the base: {1e6 * seconds:.1f} us each (median). "
            "One assignment; no weight is touched.",
        )

    def show_mixed(self, rows: Sequence[MixedRow]) -> None:
        """Print the mixed batch, row by row."""
        cells = [(row.adapter or "base", row.prompt, row.text, f"{row.difference:.1e}") for row in rows]
        self._print(
            "one batch, another adapter in every row",
            _build_table(("row", "prompt", "written", "off by"), cells),
            "off by: the largest difference of a logit from the same row where all rows use its adapter; "
            f"bound {rows[0].bound:.1e}",
        )

    def show_merged(self, name: str, report: MergeReport) -> None:
        """Print what the merge wrote, and how far its logits are from base + adapter."""
        assert report.logits is not None
        self._print(
            f"merge {name} into a copy of the base",
            f"{report.out}: {decimal(report.bytes)} in {report.seconds:.1f} s. No logit is more than "
            f"{report.logits.largest_difference:.1e} from base + adapter; bound {report.logits.bound:.1e}",
        )

    def show_summary(self, report: DemoReport) -> None:
        """Print all figures, where everything is, and what to try next."""
        header = ("adapter", "parameters", "on disk", "steps", "training", "base right", "guessing", "adapter right")
        state = "bit for bit what they were" if report.base_unchanged else "CHANGED"
        self._print(
            "in figures",
            _build_table(header, map(_list_figures, report.tasks.values())),
            f"base: {report.base_parameters:,} parameters, {state}",
            f"{report.seconds:.0f} s in all; at most {decimal(report.peak_bytes)} of memory",
        )
        self._print(
            f"all of it is in {report.out}",
            f"adapters {', '.join(report.tasks)}, each with a report.html; rows in data; figures in demo.json",
            "now try:",
        )
        for command in list_next_commands(report):
            # A command is pasted: it must stay one line.
            self._console.print(f"  {command}", soft_wrap=True)

    def _print(self, title: str, *parts: str | Table) -> None:
        self._console.print("", Text(title, style="bold"), *parts, sep="\n")


def list_next_commands(report: DemoReport) -> list[str]:
    """Return commands that use what the demo wrote."""
    asking = [
        shlex.join(
            ["lora-kit", "generate", "--adapter", f"{report.out / name}", "--compare", "--prompt", task.prompts[0]]
        )
        for name, task in report.tasks.items()
    ]
    prompt = shlex.quote(report.tasks[report.merged_adapter].prompts[0])
    folder = shlex.quote(str(report.out))
    return [
        *asking,
        f"lora-kit generate --base {shlex.quote(str(report.merged.out))} --prompt {prompt}",
        f"lora-kit list {folder}",
        f"lora-kit inspect {folder}/{report.merged_adapter}",
    ]


def _list_figures(result: TaskResult) -> tuple[str, ...]:
    training, chance = result.training, f"{result.task.chance:.0%}" if result.task.chance else "-"
    figures = (f"{training.trainable:,}", decimal(result.bytes), f"{training.steps}", f"{training.seconds:.1f} s")
    return (result.task.name, *figures, f"{result.base_score:.0%}", chance, f"{result.score:.0%}")


def _build_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(_format_cell, row))
    return table


def _format_cell(text: str) -> Text:
    """Return text of a model for a table: on one line, cut where it is long, with nothing that steers a terminal."""
    line = escape_text(" ".join(text.split()))
    return Text(line if len(line) <= _CELL_LENGTH else f"{line[: _CELL_LENGTH - 3]}...")
