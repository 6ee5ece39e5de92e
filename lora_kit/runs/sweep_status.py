"""The state of a sweep, from its files alone."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lora_kit.errors import AdapterError
from lora_kit.io.locks import FileLock
from lora_kit.io.read import exists, folder_exists, read_json
from lora_kit.io.text import escape_text
from lora_kit.names import RECIPE_FILE, SWEEP_SUFFIX

SWEEP_PLAN: Final = "plan.json"
SWEEP_JOURNAL: Final = "journal.log"
SWEEP_RESULTS: Final = "results.json"
SWEEP_LOCKS: Final = "locks"
SWEEP_TRIALS: Final = "trials"
_LIMIT: Final = 2**23
_SETTINGS: Final = ("method", "metric", "trials", "seed", "prune", "keep", "together")
"""Fields of a plan that are flags of `lora-kit sweep`."""


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """A sweep as its files show it.

    Attributes:
        out: folder of the best trial's result.
        folder: of the sweep.
        state: what it does.
        metric: by which trials are compared.
        trials: how many there will be.
        ended: how many have ended; None where optuna, which reads its journal, is not installed.
        best: the best value so far; None before there is one.
        running: outputs of the trials that processes have, by number.
        updated: when it last wrote anything, in seconds since 1970.
        command: that goes on with a sweep that is stopped; None for any other.
    """

    out: Path
    folder: Path
    state: Literal["running", "stopped", "done"]
    metric: str
    trials: int
    ended: int | None
    best: float | None
    running: tuple[Path, ...]
    updated: float
    command: str | None

    def to_json(self) -> dict[str, object]:
        """Return the status as JSON values."""
        paths = {"out": str(self.out), "folder": str(self.folder), "running": [str(trial) for trial in self.running]}
        return {"kind": "sweep", **vars(self), **paths}


def read_sweep_status(folder: Path) -> SweepStatus:
    """Return the state of the sweep in a folder; nothing is written, and the sweep is not disturbed.

    Raises:
        AdapterError, StorageError: its plan or its journal is damaged, or cannot be read.
    """
    plan = read_json(folder / SWEEP_PLAN, limit=_LIMIT)
    if not all(isinstance(plan.get(name), kind) for name, kind in (("metric", str), ("trials", int), ("over", dict))):
        raise AdapterError(f"{escape_text(folder / SWEEP_PLAN)} is damaged")
    times = {name: os.stat(folder / name).st_mtime for name in _list_files(folder)}
    is_done = times.get(SWEEP_RESULTS, 0.0) >= times[SWEEP_PLAN]
    out = folder.with_name(folder.name.removesuffix(SWEEP_SUFFIX))
    running = tuple(folder / SWEEP_TRIALS / str(number) / out.name for number in _list_running_trials(folder))
    ended, best = _count_trials(folder)
    return SweepStatus(
        out=out,
        folder=folder,
        state="running" if running else "done" if is_done else "stopped",
        metric=plan["metric"],
        trials=plan["trials"],
        ended=ended,
        best=best,
        running=running,
        updated=max(times.values()),
        command=None if running or is_done else _build_command(folder, plan),
    )


def _list_files(folder: Path) -> Iterator[str]:
    yield from (name for name in (SWEEP_PLAN, SWEEP_JOURNAL, SWEEP_RESULTS) if exists(folder / name))


def _list_running_trials(folder: Path) -> list[int]:
    """Return the numbers of the trials that processes have: a process that runs one holds its lock."""
    if not folder_exists(folder / SWEEP_LOCKS):
        return []
    locks = [path for path in (folder / SWEEP_LOCKS).iterdir() if path.name.isdecimal()]
    return sorted(int(path.name) for path in locks if FileLock(path).is_held)


def _count_trials(folder: Path) -> tuple[int | None, float | None]:
    """Return how many trials have ended, and the best value."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage
    except ImportError:
        return None, None
    if not exists(folder / SWEEP_JOURNAL):
        return 0, None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = JournalStorage(JournalFileBackend(str(folder / SWEEP_JOURNAL)))
        (study,) = optuna.get_all_study_names(storage)
        trials = optuna.load_study(study_name=study, storage=storage)
        ended = [trial for trial in trials.get_trials(deepcopy=False) if trial.state.is_finished()]
        with contextlib.suppress(ValueError):
            return len(ended), trials.best_value
        return len(ended), None
    except Exception as error:  # a line may be anything, and Optuna trusts it
        path = escape_text(folder / SWEEP_JOURNAL)
        raise AdapterError(
            f"{path} is damaged: {type(error).__name__}", hint="remove the folder to start anew"
        ) from None


def _build_command(folder: Path, plan: Mapping[str, Any]) -> str | None:
    """Return the command that goes on with a sweep; None for one that an older version began."""
    recipe, work = (folder / RECIPE_FILE).absolute(), Path(plan.get("started_in") or Path.cwd())
    if not exists(recipe):
        return None
    words = ["lora-kit", "sweep", str(recipe.relative_to(work) if recipe.is_relative_to(work) else recipe)]
    for key, values in plan["over"].items():
        shown = values if isinstance(values, str) else ",".join(map(json.dumps, values))
        words += ["--over", f"{key}={shown}"]
    for name in _SETTINGS:
        if plan.get(name) is not None and (name, plan[name]) != ("together", 1):
            words += [f"--{name}", str(plan[name])]
    change = "" if work == Path.cwd() else f"cd {shlex.quote(str(work))} && "
    return change + shlex.join(words)
