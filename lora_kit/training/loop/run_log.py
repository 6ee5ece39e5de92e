"""What a training writes of itself as it goes, for others to look at; see `lora_kit.runs.run_files`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from lora_kit.errors import LoraKitError, StorageError
from lora_kit.evaluation.measure import Evaluation
from lora_kit.io.atomic_write import write_file
from lora_kit.io.output_lock import open_staging_file
from lora_kit.io.text import escape_text
from lora_kit.names import METRICS_FILE, RECIPE_FILE
from lora_kit.runs.run_files import PROGRESS_FILE, LogEntry, RunProgress, read_progress, remove_run_files
from lora_kit.training.results import list_log_entries

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS: Final = 1.0
"""Least time between two writes of where the training stands."""


class RunLog(transformers.TrainerCallback):
    """Writes the log and where a training stands into the folder of its checkpoints.

    The log is a copy of transformers' own, which a checkpoint holds: it is written whole when a training begins or
    resumes, and then appended to. Each of its lines gets the time it was logged at. A disk that fails is a warning and
    stops no training: the log is also part of the result.

    Args:
        folder: of the checkpoints.
        recipe: as YAML.
        progress: with the facts of this training; its counts are set here.
        before: metrics before training; None without validation rows.
    """

    def __init__(self, folder: Path, *, recipe: str, progress: RunProgress, before: Evaluation | None) -> None:
        self._folder, self._recipe, self._progress, self._before = folder, recipe, progress, before
        self._seen = 0
        self._is_behind = True
        self._has_failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if args.eval_on_start:  # which logs the same
            self._before = None
        now, step = time.time(), state.global_step
        self._progress = dataclasses.replace(
            self._progress, step=step, first_step=step, steps=state.max_steps, started=now, updated=now
        )
        self._try(self._write_first_files)
        self._update_log(state)
        self._update_progress(step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if time.time() - self._progress.updated >= _PROGRESS_SECONDS:
            self._update_progress(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        for entry in state.log_history[self._seen :]:
            entry["time"] = round(time.time(), 3)
        self._update_log(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._update_progress(state.global_step)

    def _write_first_files(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._folder / RECIPE_FILE, self._recipe.encode())

    def _update_log(self, state: TrainerState) -> None:
        path = self._folder / METRICS_FILE
        if self._is_behind:
            lines = _format_lines(list_log_entries(self._before, state.log_history))
            self._is_behind = not self._try(lambda: write_file(path, lines))
        else:
            lines = _format_lines(list_log_entries(None, state.log_history[self._seen :]))
            # Lines that were cut off are replaced with the whole file the next time.
            self._is_behind = not self._try(lambda: _append(path, lines))
        self._seen = len(state.log_history)

    def _update_progress(self, step: int) -> None:
        self._progress = dataclasses.replace(self._progress, step=step, updated=time.time())
        self._try(lambda: write_progress(self._folder, self._progress))

    def _try(self, write: Callable[[], None]) -> bool:
        """Return whether a write succeeded; log the first that does not."""
        try:
            write()
        except (OSError, StorageError) as error:
            if not self._has_failed:
                logger.warning("%s: the log cannot be followed: %s", escape_text(self._folder), error)
            self._has_failed = True
            return False
        return True


def _format_lines(entries: Iterable[LogEntry]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _append(path: Path, data: bytes) -> None:
    """Append lines to a file in one write.

    Raises:
        OSError: they are not, or not whole, in the file.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        written = os.write(descriptor, data)
    finally:
        os.close(descriptor)
    if written != len(data):
        raise OSError(f"{written} of {len(data)} bytes were written")


def write_progress(folder: Path, progress: RunProgress) -> None:
    """Replace the progress of a run in one step; it need not survive a power cut."""
    target = folder / PROGRESS_FILE
    with open_staging_file(target) as staging:
        staging.write_text(json.dumps(progress.to_json()) + "\n", encoding="utf-8")
        os.replace(staging, target)


def end_run_log(folder: Path, error: BaseException, *, keep: bool) -> None:
    """Write down what ended a run before its result was saved.

    Args:
        keep: whether there is something to go on from; else no file of the log stays.
    """
    try:
        progress = read_progress(folder)
        if keep and progress is not None:
            words = " ".join(str(error).split())
            write_progress(folder, dataclasses.replace(progress, error=words or type(error).__name__))
        elif not keep:
            remove_run_files(folder)
    except (OSError, LoraKitError) as failure:
        logger.warning("%s: %s", escape_text(folder), failure)
