"""What the demo says. All its printing is here; plain lines where there is no terminal."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_kit.demo.demo_results import SWAP_SECONDS, Agreement, DemoReport, Merged, Mixed, Swaps, Trained

_PIPE_WIDTH: Final = 120
"""Columns where there is no terminal to ask."""
_SHOWN: Final = 2
"""Held-out prompts shown per task."""
_LONGEST: Final = 90


def console() -> Console:
    made = Console(markup=False, highlight=False, emoji=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _PIPE_WIDTH
    return made


class Show:
    """The demo on a console, step by step."""

    def __init__(self, screen: Console | None = None) -> None:
        self._console = screen or console()

    def opening(self, *, parameters: int, seconds: float, tasks: int) -> None:
        self._title(f"{tasks} adapters on one frozen base")
        self._say(f"kit-base: {parameters / 1e6:.1f} M parameters, ready in {seconds:.1f} s, imports included.")
        self._say("It writes children's-book English and knows no instructions; each adapter teaches it one task.")
        self._say("No prompt below was in the training data.")

    def trained(self, found: Trained) -> None:
        report = found.report
        self._title(f"{report.out.name}: {found.task.summary}")
        self._say(
            f"{report.steps} steps in {report.seconds:.1f} s ({report.tokens_per_second:,.0f} tokens/s); "
            f"{report.trainable:,} parameters, {100 * report.trainable / report.parameters:.1f} % of the model"
        )
        table = self._table("prompt", "base", report.out.name)
        for prompt, base, text in list(zip(found.prompts, found.base_texts, found.texts, strict=True))[:_SHOWN]:
            table.add_row(_cell(prompt), _cell(base), _cell(text))
        self._console.print(table)
        scores = f"base {found.base_score:.0%}, adapter {found.score:.0%}"
        self._say(f"right on {len(found.prompts)} held-out prompts: {scores}")

    def swaps(self, found: Swaps, names: Sequence[str]) -> None:
        self._title("swap adapters in the running model")
        self._say(
            f"{found.count:,} swaps between {', '.join(names)} and the base: {1e6 * found.median_seconds:.1f} us each "
            f"(median; aim: under {1e6 * SWAP_SECONDS:.0f}). One assignment; no weight is touched."
        )

    def mixed(self, found: Mixed) -> None:
        self._title("one batch, another adapter in every row")
        table = self._table("row", "prompt", "written", "off by")
        for row in found.rows:
            table.add_row(row.adapter or "base", _cell(row.prompt), _cell(row.text), f"{row.difference:.1e}")
        self._console.print(table)
        self._say(
            f"off by: the largest difference of a logit from the same row where all rows use its adapter; "
            f"{_verdict(found.agreement)}"
        )

    def merged(self, found: Merged) -> None:
        self._title(f"merge {found.name} into a copy of the base")
        self._say(
            f"{found.report.out}: {_size(found.report.bytes)} in {found.report.seconds:.1f} s. On {found.prompts} "
            f"held-out prompts no logit is more than {found.agreement.difference:.1e} from base + adapter; "
            f"{_verdict(found.agreement)}"
        )

    def summary(self, report: DemoReport) -> None:
        self._title("in figures")
        table = self._table(
            "adapter", "parameters", "on disk", "steps", "training", "base right", "guessing", "adapter right"
        )
        for name, found in report.trained.items():
            run = found.report
            figures = (f"{run.trainable:,}", _size(found.bytes), f"{run.steps}", f"{run.seconds:.1f} s")
            guessing = f"{found.task.chance:.0%}" if found.task.chance else "-"
            table.add_row(name, *figures, f"{found.base_score:.0%}", guessing, f"{found.score:.0%}")
        self._console.print(table)
        facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for row in _facts(report):
            facts.add_row(*row)
        self._console.print(facts)

    def closing(self, report: DemoReport, prompts: Mapping[str, str]) -> None:
        self._title(f"all of it is in {report.out}")
        picture = f"; picture in {report.picture.name}" if report.picture else ""
        self._say(f"adapters {', '.join(report.trained)}; rows in data; figures in demo.json{picture}")
        self._say("now try:")
        for line in next_commands(report.out, prompts, merged=report.merged.report.out):
            # A command is pasted: it must stay one line.
            self._console.print(f"  {line}", soft_wrap=True)

    def _title(self, text: str) -> None:
        self._console.print()
        self._console.print(Text(text, style="bold"))

    def _say(self, text: str) -> None:
        self._console.print(text)

    def _table(self, *titles: str) -> Table:
        table = Table(box=box.SIMPLE, pad_edge=False)
        for title in titles:
            table.add_column(title, overflow="fold")
        return table


def next_commands(out: Path, prompts: Mapping[str, str], *, merged: Path) -> list[str]:
    """Commands that use what the demo made."""
    first = next(iter(prompts))
    asking = [
        shlex.join(["lora-kit", "generate", "--adapter", str(out / name), "--compare", "--prompt", prompt])
        for name, prompt in prompts.items()
    ]
    return [
        *asking,
        # A base of its own has no record of what stood after prompts in training: the line break is given here.
        f"lora-kit generate --base {shlex.quote(str(merged))} --prompt ${shlex.quote(prompts[first] + chr(92) + 'n')}",
        shlex.join(["lora-kit", "list", str(out)]),
        shlex.join(["lora-kit", "inspect", str(out / first)]),
    ]


def _facts(report: DemoReport) -> list[tuple[str, str]]:
    return [
        (
            "base",
            f"{report.base_parameters:,} parameters, "
            + ("bit for bit what they were" if report.base_unchanged else "CHANGED"),
        ),
        ("swap", f"{1e6 * report.swaps.median_seconds:.1f} us (median of {report.swaps.count:,})"),
        ("mixed batch", _distance(report.mixed.agreement)),
        ("merge", _distance(report.merged.agreement)),
        ("memory", f"{_size(report.peak_bytes)} at the most, of the whole process"),
        ("time", f"{report.seconds:.0f} s in all"),
    ]


def _verdict(found: Agreement) -> str:
    return f"bound {found.bound:.1e}: " + ("they agree" if found.holds else "THEY DIFFER")


def _distance(found: Agreement) -> str:
    return f"logits within {found.difference:.1e}; bound {found.bound:.1e}"


def _cell(text: str) -> Text:
    """Text of a model in a table: on one line, cut where it rambles, nothing in it that could steer a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return Text(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}...")


def _size(count: int) -> str:
    """Bytes in powers of 1000."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"
