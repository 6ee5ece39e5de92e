"""What a training leaves beside its checkpoints as it goes, so that it can be looked at from outside.

    adapters/sql.run/
        metrics.jsonl   the log so far: the lines that the result's metrics.jsonl begins with
        progress.json   where it stands: a `RunProgress`
        recipe.yaml     the recipe as resolved: `lora-kit train adapters/sql.run/recipe.yaml` goes on with it

`metrics.jsonl` is appended to in whole lines. Where a training resumes it begins with the lines of the checkpoint, so
no line is missing or there twice. `progress.json` is replaced whole, at most once a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

from lora_kit.adapter.adapter_record import RECORD
from lora_kit.errors import AdapterError, StorageError
from lora_kit.io.output_lock import remove_staging_files
from lora_kit.io.read import exists, folder_exists, read_json, read_text
from lora_kit.io.text import escape_text
from lora_kit.names import METRICS_FILE, RECIPE_FILE, RUN_SUFFIX

PROGRESS_FILE: Final = "progress.json"
RUN_FILES: Final = (METRICS_FILE, PROGRESS_FILE, RECIPE_FILE)
"""The files of a run that are no checkpoint."""
_PROGRESS_LIMIT: Final = 2**16
_LOG_LIMIT: Final = 2**28
_RECORD_LIMIT: Final = 2**24

LogEntry: TypeAlias = Mapping[str, Any]
"""A line of metrics.jsonl: `step`, and numbers by name. An evaluation's names begin with `eval_`."""

_COUNTS: Final = ("processes", "step", "steps", "first_step")
"""Fields of a `RunProgress` that are whole numbers."""


@dataclass(frozen=True, kw_only=True)
class RunProgress:
    """Where a training stands. Times are seconds since 1970.

    Attributes:
        title: what is trained, in words.
        run: hash of what decides the result, as in the record of the adapter.
        folder: working directory of the process.
        processes: that share the rows.
        processes_by_machine: how many of them each machine has.
        step: optimizer steps done.
        steps: to be done.
        first_step: at which this process began.
        started: when it began with its steps.
        updated: when this was written.
        error: what ended it; None as long as nothing has.
    """

    title: str
    run: str
    folder: str
    processes: int
    processes_by_machine: tuple[int, ...] = ()
    step: int = 0
    steps: int = 0
    first_step: int = 0
    started: float = 0.0
    updated: float = 0.0
    error: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON values."""
        return asdict(self)

    @property
    def seconds_left(self) -> float | None:
        """Estimated time of the steps left, at the speed of those that this process has done; None before the first."""
        done = self.step - self.first_step
        return (self.updated - self.started) / done * (self.steps - self.step) if done > 0 else None


def find_run_folder(out: Path) -> Path:
    """Return the folder of an output's checkpoints, whether it is there or not."""
    return out.with_name(f"{out.name}{RUN_SUFFIX}")


def read_progress(folder: Path) -> RunProgress | None:
    """Return where the training of a run folder stands; None before its first step.

    Raises:
        AdapterError: the file is damaged.
    """
    path = folder / PROGRESS_FILE
    if not exists(path):
        return None
    values = {"processes_by_machine": [], **read_json(path, limit=_PROGRESS_LIMIT)}
    kinds = {"title": str, "run": str, "folder": str, **dict.fromkeys(_COUNTS, int), "processes_by_machine": list}
    names = [field.name for field in fields(RunProgress)]
    good = sorted(values) == sorted(names) and all(isinstance(values[name], kind) for name, kind in kinds.items())
    good = good and all(type(count) is int for count in values["processes_by_machine"])
    if not good or not all(isinstance(values[name], (int, float)) for name in ("started", "updated")):
        raise AdapterError(f"{escape_text(path)} is damaged", hint="the training writes it anew when it goes on")
    return RunProgress(**{**values, "processes_by_machine": tuple(values["processes_by_machine"])})


def remove_run_files(folder: Path) -> None:
    """Remove the files of a run that are no checkpoint, and the folder where it is then empty."""
    if not folder_exists(folder):
        return
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
        remove_staging_files(folder / name)
    if next(folder.iterdir(), None) is None:
        folder.rmdir()


def read_saved_run(out: Path) -> object:
    """Return the hash of the run that saved a result, as its record has it; None where it does not say."""
    try:
        return read_json(out / RECORD, limit=_RECORD_LIMIT).get("run")
    except (AdapterError, StorageError):
        return None


def read_log(path: Path) -> tuple[LogEntry, ...]:
    """Return the whole lines of a metrics.jsonl; empty where there is none.

    None stands for a number that is not finite.

    Raises:
        AdapterError: a line is no JSON object with a step.
    """
    if not exists(path):
        return ()
    *lines, _ = read_text(path, limit=_LOG_LIMIT).split("\n")
    return tuple(_parse_entry(line, number, path) for number, line in enumerate(lines, start=1))


def _parse_entry(line: str, number: int, path: Path) -> LogEntry:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise AdapterError(f"{escape_text(path)}: line {number} is not of a log")
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()}  # fmt: skip
