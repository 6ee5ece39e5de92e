"""`runs`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.cli.app import AsJson, app
from lora_kit.cli.output import print_json, print_table, print_text

if TYPE_CHECKING:
    from lora_kit.runs.find_runs import Status
    from lora_kit.runs.run_status import RunStatus

_AGES: Final = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@app.command
def runs(folder: Path = Path(), /, *, json: AsJson = False) -> None:
    """List trainings and sweeps: running, stopped (with the command that goes on), done.

    Example: lora-kit runs

    Args:
        folder: Folder that is searched, with those in it.
    """
    from lora_kit.runs.find_runs import find_runs

    found = find_runs(folder)
    if json:
        print_json([status.to_json() for status in found])
        return
    rows = [(*build_cells(status), _format_age(status.updated)) for status in found]
    print_table(("out", "state", "steps", "loss", "validation", "age"), rows)
    if not found:
        print_text(f"no training and no sweep under {folder.absolute()}")
    commands = [status.command for status in found if status.command]
    if commands:
        print_text("\n  ".join(["\nto go on:", *commands]))


def build_cells(status: Status) -> tuple[str, ...]:
    """Return how a training or a sweep stands: its output, state, steps, loss and validation."""
    from lora_kit.runs.run_status import DamagedRun
    from lora_kit.runs.sweep_status import SweepStatus

    if isinstance(status, DamagedRun):
        return str(status.out), status.state, "", "", status.problem
    if isinstance(status, SweepStatus):
        ended = "?" if status.ended is None else str(status.ended)
        best = "" if status.best is None else f"best {status.metric} {status.best:.4g}"
        return f"{status.out} (sweep)", status.state, f"{ended} of {status.trials} trials", "", best
    steps = f"{status.step:,}" + (f" of {status.steps:,}" if status.steps and status.state != "done" else "")
    loss = format_value(status.losses[-1]["loss"]) if status.losses else ""
    return str(status.out), status.state, steps, loss, format_evaluation(status)


def format_evaluation(status: RunStatus) -> str:
    """Return the last metrics of the validation rows as text: the loss, and the first other one."""
    if not status.evaluations:
        return ""
    metrics = {key.removeprefix("eval_"): value for key, value in status.evaluations[-1].items()
               if key.startswith("eval_")}  # fmt: skip
    order = sorted(metrics, key=lambda name: name != "loss")
    return ", ".join(f"{name} {format_value(metrics[name])}" for name in order[:2])


def format_value(value: object) -> str:
    """Return a value of a log as text; `nan` for None, which stands for a number that is not finite."""
    if value is None:
        return "nan"
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def _format_age(updated: float | None) -> str:
    if updated is None:
        return ""
    seconds = max(0, round(time.time() - updated))
    return next((f"{seconds // size} {unit}" for size, unit in _AGES if seconds >= size), "now")
