"""The state of a training, from its files alone: running, stopped, done; its numbers; how to go on with it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from lora_kit.io.locks import FileLock
from lora_kit.io.output_lock import lock_path
from lora_kit.io.read import exists, folder_exists
from lora_kit.names import CHECKPOINT_FILE, METRICS_FILE, RECIPE_FILE
from lora_kit.runs.run_files import LogEntry, RunProgress, find_run_folder, read_log, read_progress, read_saved_run

RunState = Literal["not started", "starting", "running", "stopped", "done"]
"""`starting` until the first step: the base is loaded, the rows are read and measured."""
_CHECKPOINT: Final = re.compile(r"checkpoint-(\d{1,18})")


@dataclass(frozen=True, kw_only=True)
class DamagedRun:
    """A training or a sweep whose files cannot be read.

    Attributes:
        out: folder of its result.
        problem: what is wrong, in words.
        state: always `damaged`.
        updated: not known.
        command: none goes on with it.
    """

    out: Path
    problem: str
    state: Literal["damaged"] = "damaged"
    updated: None = None
    command: None = None

    def to_json(self) -> dict[str, object]:
        """Return the status as JSON values."""
        return {"kind": "damaged", "out": str(self.out), "state": self.state, "problem": self.problem}


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A training as its files show it.

    Attributes:
        out: folder of its result.
        state: what it does.
        progress: where it stands; None before its first step, and once it is done.
        log: the lines of its metrics.jsonl.
        checkpoints: steps of its checkpoints.
        updated: when it last wrote anything, in seconds since 1970; None where it has not yet.
    """

    out: Path
    state: RunState
    progress: RunProgress | None
    log: tuple[LogEntry, ...]
    checkpoints: tuple[int, ...]
    updated: float | None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return max(self.progress.step if self.progress else 0, self.log[-1]["step"] if self.log else 0)

    @property
    def steps(self) -> int | None:
        """Optimizer steps to be done; None before that is known."""
        return self.progress.steps if self.progress else self.step if self.state == "done" else None

    @property
    def losses(self) -> list[LogEntry]:
        """The lines with a training loss."""
        return [entry for entry in self.log if "loss" in entry]

    @property
    def evaluations(self) -> list[LogEntry]:
        """The lines with metrics of the validation rows."""
        return [entry for entry in self.log if any(key.startswith("eval_") for key in entry)]

    @property
    def train_loss(self) -> float | None:
        """The last training loss; None before there is one."""
        return self.losses[-1]["loss"] if self.losses else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated time that is left; None where it does not run, or has done no step."""
        return self.progress.seconds_left if self.progress and self.state == "running" else None

    @property
    def error(self) -> str | None:
        """What ended a training that is stopped; None where it was killed."""
        return self.progress.error if self.progress and self.state == "stopped" else None

    @property
    def command(self) -> str | None:
        """The command that goes on with a training that is stopped, or begins it again; None for any other."""
        if self.state != "stopped" or self.progress is None:
            return None
        folder = Path(self.progress.folder)
        recipe = (find_run_folder(self.out) / RECIPE_FILE).absolute()
        shown = recipe.relative_to(folder) if recipe.is_relative_to(folder) else recipe
        program, note = _describe_program(self.progress, self.out.name)
        replace = " --replace" if exists(self.out) else ""
        change = "" if folder == Path.cwd() else f"cd {shlex.quote(str(folder))} && "
        return f"{change}{program} {shlex.quote(str(shown))}{replace}{note}"

    def to_json(self) -> dict[str, object]:
        """Return the status as JSON values."""
        return {
            "kind": "training",
            "out": str(self.out),
            "state": self.state,
            "title": self.progress.title if self.progress else None,
            "step": self.step,
            "steps": self.steps,
            "train_loss": self.train_loss,
            "evaluation": dict(self.evaluations[-1]) if self.evaluations else None,
            "seconds_left": self.seconds_left,
            "checkpoints": list(self.checkpoints),
            "updated": self.updated,
            "error": self.error,
            "command": self.command,
        }


def _describe_program(progress: RunProgress, name: str) -> tuple[str, str]:
    """Return what trains with as many processes as a run had, and a comment that follows its arguments."""
    if progress.processes == 1:
        return "lora-kit train", ""
    counts = progress.processes_by_machine or (progress.processes,)
    are_alike = len(set(counts)) == 1
    each = f"--nproc-per-node {counts[0] if are_alike else 'COUNT'} -m lora_kit train"
    if len(counts) == 1:
        return f"torchrun {each}", ""
    together = f"--nnodes {len(counts)} --rdzv-backend c10d --rdzv-endpoint FIRST:29500"
    note = f"  # on each of {len(counts)} machines; FIRST is the name of one of them"
    note += "" if are_alike else f", COUNT is {', '.join(map(str, counts))}"
    return f"torchrun {together} --rdzv-id {shlex.quote(name)} {each}", note


def read_status(out: Path) -> RunStatus:
    """Return the state of the training to an output; nothing is written, and the training is not disturbed.

    Raises:
        AdapterError, StorageError: its files are damaged, or cannot be read.
    """
    folder = find_run_folder(out)
    is_held = FileLock(lock_path(folder)).is_held
    progress = read_progress(folder)
    checkpoints = tuple(sorted(_list_checkpoints(folder)))
    if is_held:
        state: RunState = "running" if progress and progress.error is None else "starting"
    elif (progress and read_saved_run(out) == progress.run) or not (progress or checkpoints):
        return _read_result(out)
    else:
        state = "stopped"
    return RunStatus(
        out=out,
        state=state,
        progress=progress,
        log=read_log(folder / METRICS_FILE),
        checkpoints=checkpoints,
        updated=progress.updated if progress else _read_time(folder),
    )


def _read_result(out: Path) -> RunStatus:
    """Return the state of a training that left nothing but perhaps its result."""
    log = read_log(out / METRICS_FILE) if folder_exists(out) else ()
    state: RunState = "done" if log else "not started"
    return RunStatus(
        out=out, state=state, progress=None, log=log, checkpoints=(), updated=_read_time(out / METRICS_FILE)
    )


def _list_checkpoints(folder: Path) -> Iterator[int]:
    """Yield the steps of the checkpoints that have their last file; whether they are whole is for who reads them."""
    if folder_exists(folder):
        for entry in folder.iterdir():
            match = _CHECKPOINT.fullmatch(entry.name)
            if match and exists(entry / CHECKPOINT_FILE):
                yield int(match[1])


def _read_time(path: Path) -> float | None:
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime
    return None
