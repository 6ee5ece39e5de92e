"""`follow`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.output import create_console, format_size, print_json, print_table, print_text
from lora_kit.cli.runs import build_cells, format_evaluation, format_value
from lora_kit.errors import ConfigError, VerificationError
from lora_kit.io.text import escape_for_terminal

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lora_kit.runs.run_files import LogEntry
    from lora_kit.runs.run_status import RunStatus
    from lora_kit.runs.sweep_status import SweepStatus

_POLL_SECONDS: Final = 0.5
_PATIENCE_SECONDS: Final = 30
"""How long a sweep may go without a process that has a trial."""
_LAST_LOSSES: Final = 5
_PORT: Final = 8765


@app.command
def follow(run: Path, /, *, once: bool = False, web: bool = False, port: int = _PORT, json: AsJson = False) -> None:
    """Watch a training from another terminal: how far it is, its losses, its evaluations, the time left.

    It reads the training's files, and does not disturb it. It ends with the training: with exit code 0 if its result
    was saved, with 4 if it was not. Of a sweep it shows how it stands and the trial that is running, one after another.

    Example: lora-kit follow recipe.yaml

    Args:
        run: A recipe, its out, or the folder of the checkpoints, <out>.run; or of a sweep, <out>.sweep.
        once: Print how it stands now, and end.
        web: Serve a page that shows it, on this machine only.
        port: Of the page; 0 for any that is free.
    """
    from lora_kit.runs.find_runs import find_run, find_sweep
    from lora_kit.runs.run_status import read_status

    if web and (once or json):
        raise ConfigError("--web does not go with --once and --json")
    sweep = find_sweep(run)
    if sweep is not None:
        _follow_sweep(sweep, once=once, web=web, port=port, json=json)
        return
    out = find_run(run)
    if web:
        _serve(out, port)
    elif json:
        status = read_status(out)
        print_json({**status.to_json(), "log": [dict(entry) for entry in status.log]})
    elif once:
        _show_once(out)
    else:
        _watch(out)


def _follow_sweep(folder: Path, *, once: bool, web: bool, port: int, json: bool) -> None:
    from lora_kit.runs.sweep_status import read_sweep_status

    status = read_sweep_status(folder)
    if web:
        if not status.running:
            raise ConfigError(f"no trial of {folder} is running", hint="lora-kit runs lists what there is")
        _serve(status.running[0], port)
    elif json:
        print_json(status.to_json())
    elif once:
        print_text(_format_sweep(status))
        for trial in status.running:
            _show_once(trial)
        if status.command:
            print_text(f"to go on: {status.command}")
    else:
        _watch_sweep(folder)


def _show_once(out: Path) -> None:
    from lora_kit.runs.run_status import read_status

    status = read_status(out)
    print_text(_format_headline(status))
    print_table(("", ""), list(_list_facts(status)))


def _serve(out: Path, port: int) -> None:
    from lora_kit.runs.run_page import serve_run_page

    serve_run_page(out, port=port, on_ready=lambda url: print_text(f"{url}  (Ctrl-C ends the page, not the training)"))


def _watch_sweep(folder: Path) -> None:
    """Show a sweep and its trials, one at a time, until it ends.

    Raises:
        VerificationError: it ended without a result.
    """
    from lora_kit.runs.run_status import read_status
    from lora_kit.runs.sweep_status import read_sweep_status

    line, last_seen = "", float("-inf")
    while True:
        status = read_sweep_status(folder)
        # No process has a trial for a moment after each one, and while the best is put in place.
        last_seen = time.monotonic() if status.running else last_seen
        has_ended = status.state != "running" and time.monotonic() - last_seen > _PATIENCE_SECONDS
        if _format_sweep(status) != line and (has_ended or status.state != "stopped"):
            line = _format_sweep(status)
            print_text(line)
        if status.state == "done":
            return
        if has_ended:
            raise _build_no_result_error(status, "")
        trial = next((trial for trial in status.running if read_status(trial).state in ("starting", "running")), None)
        if trial is not None:
            _show(trial)
        else:
            time.sleep(_POLL_SECONDS)


def _show(out: Path) -> RunStatus:
    return _show_live(out) if sys.stdout.isatty() else _print_lines(out)


def _watch(out: Path) -> None:
    """Show a training until it ends.

    Raises:
        VerificationError: it ended without a result.
    """
    status = _show(out)
    if status.state != "done":
        raise _build_no_result_error(status, status.error)


def _build_no_result_error(status: RunStatus | SweepStatus, why: str | None) -> VerificationError:
    hint = f"to go on: {status.command}" if status.command else "its own terminal says why"
    return VerificationError(f"{status.out} has no result: {why or 'its process has ended'}", hint=hint)


def _poll(out: Path) -> Iterator[RunStatus]:
    """Yield the state of a training until it has ended; one that has not begun is waited for."""
    from lora_kit.runs.run_status import read_status

    begun = False
    while True:
        status = read_status(out)
        if begun and status.state == "not started":  # its files were removed: what was shown before says more
            return
        yield status
        if status.state in ("done", "stopped"):
            return
        begun = begun or status.state != "not started"
        time.sleep(_POLL_SECONDS)


def _show_live(out: Path) -> RunStatus:
    from rich.live import Live

    with Live(console=create_console(), refresh_per_second=4) as live:
        for status in _poll(out):
            live.update(_build_view(status), refresh=True)
    return status


def _print_lines(out: Path) -> RunStatus:
    """Print a line for each new line of the log, where there is no terminal to draw on."""
    shown, state = -1, ""
    for status in _poll(out):
        if status.state != state and status.state != "running":
            print_text(f"{out}: {status.state}")
        state = status.state
        new = [entry for entry in status.log[max(shown, 0) :] if _format_entry(entry)]
        for entry in new:
            print_text(f"step {entry['step']:,}: {_format_entry(entry)}")
        shown = len(status.log)
        sys.stdout.flush()
    return status


def _build_view(status: RunStatus) -> RenderableType:
    """Return how a training stands as lines: a bar, losses, evaluations, speed."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    if status.steps:
        facts.add_row("", ProgressBar(total=status.steps, completed=status.step, width=40))
    for name, text in _list_facts(status):
        facts.add_row(name, Text(escape_for_terminal(text)))
    return Group(Text(escape_for_terminal(_format_headline(status))), facts)


def _format_sweep(status: SweepStatus) -> str:
    """Return the line of a sweep as `runs` has it."""
    name, state, *facts = build_cells(status)
    return ", ".join([f"{name}: {state}", *filter(None, facts)])


def _format_headline(status: RunStatus) -> str:
    parts = [f"{status.out}: {status.state}"]
    if status.steps and status.state != "done":
        parts.append(f"step {status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})")
    elif status.steps:
        parts.append(f"{status.steps:,} steps")
    if status.seconds_left is not None:
        parts.append(f"{timedelta(seconds=round(status.seconds_left))} left")
    return ", ".join(parts)


def _list_facts(status: RunStatus) -> Iterator[tuple[str, str]]:
    """Yield the lines under the bar: a name and what is known."""
    if status.progress is not None:
        yield "training", status.progress.title
    if status.losses:
        last = [format_value(entry["loss"]) for entry in status.losses[-_LAST_LOSSES:]]
        yield "loss", f"{' → '.join(last)} (step {status.losses[-1]['step']:,})"
    if status.evaluations:
        yield "validation", f"{format_evaluation(status)} (step {status.evaluations[-1]['step']:,})"
        first = status.evaluations[0]
        if len(status.evaluations) > 1 and first["step"] == 0 and "eval_loss" in first:
            yield "before", f"loss {format_value(first['eval_loss'])}"
    speeds = [entry for entry in status.log if entry.get("tokens_per_second") and entry.get("peak_bytes")]
    if speeds:
        yield "speed", f"{speeds[-1]['tokens_per_second']:,.0f} tokens/s, {format_size(speeds[-1]['peak_bytes'])}"
    if status.checkpoints:
        yield "checkpoint", f"step {status.checkpoints[-1]:,}"
    if status.error:
        yield "ended by", status.error
    if status.command:
        yield "to go on", status.command


def _format_entry(entry: LogEntry) -> str:
    """Return a line of the log as text; empty for the summary at the end."""
    names = ("loss", "learning_rate", "grad_norm", *(key for key in entry if key.startswith("eval_")))
    parts = [f"{name} {format_value(entry[name])}" for name in names if name in entry]
    if entry.get("tokens_per_second") and parts:
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)
