"""Progress of a training: a live line on stderr where that is a terminal, and lines in the log everywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as ProgressBar
    from rich.progress import TaskID

logger = logging.getLogger(__name__)

MIN_LOG_SECONDS: Final = 5.0
"""Least time between two log lines about progress; the results of an evaluation are always logged."""
_LOGGED_KEYS: Final = ("loss", "reward", "learning_rate", "grad_norm")
_LIVE_LABELS: Final = {"reward": "reward", "learning_rate": "learning rate", "grad_norm": "gradient"}
"""What else the live line shows where it is wide enough."""
_BAR_WIDTH: Final = 20


class TrainingProgress(transformers.TrainerCallback):
    """Reports the step, the loss, the time left, the speed and the memory of a training."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._task: TaskID | None = None
        self._started, self._first_step = 0.0, 0
        self._last_logged = float("-inf")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._bar = build_live_line(console, disable=args.disable_tqdm or not console.is_terminal)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, metrics="")
        self._bar.start()
        self._started, self._first_step = time.perf_counter(), state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)
        # The last interval is logged even if it is shorter than `logging_steps`.
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        logs = logs or {}
        metrics = _format_logs(logs)
        if not metrics:
            return
        is_interval = "loss" in logs
        if self._bar is not None and self._task is not None and is_interval:
            space = self._bar.console.width - _measure_fixed_columns(state.max_steps)
            self._bar.update(self._task, metrics=_join_fitting(_list_live_metrics(logs), space))
        now, step, last = time.perf_counter(), state.global_step, state.max_steps
        if not is_interval or now - self._last_logged >= MIN_LOG_SECONDS or step >= last:
            self._last_logged = now
            logger.info("step %d of %d: %s%s", step, last, metrics, self._format_time_left(state, now))

    def _format_time_left(self, state: TrainerState, now: float) -> str:
        """Return the estimated time left; empty before the first step is done."""
        done = state.global_step - self._first_step
        if done < 1 or state.global_step >= state.max_steps:
            return ""
        seconds = (now - self._started) / done * (state.max_steps - state.global_step)
        return f", {timedelta(seconds=round(seconds))} left"

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # So is the interval in which early stopping ends the training.
        control.should_log = control.should_log or control.should_training_stop

    def close(self) -> None:
        """Remove the live line from the terminal."""
        if self._bar is not None:
            self._bar.stop()


def build_live_line(console: Console, *, disable: bool = False) -> ProgressBar:
    """Return the live line: a bar, the step, the time left, and the metrics that fit beside them."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    metrics = TextColumn("{task.fields[metrics]}", markup=False)
    columns = (BarColumn(bar_width=_BAR_WIDTH), MofNCompleteColumn(), TimeRemainingColumn(), metrics)
    return ProgressBar(*columns, console=console, disable=disable)


def _measure_fixed_columns(steps: int) -> int:
    """Return the columns that bar, step and time left take, with the blanks after each."""
    return _BAR_WIDTH + (2 * len(str(steps)) + 1) + len("0:00:00") + 3


def _join_fitting(parts: Iterable[str], space: int) -> str:
    """Return the first of some texts, and as many further ones as fit in the space."""
    text = ""
    for part in parts:
        longer = f"{text}, {part}" if text else part
        if text and len(longer) > space:
            break
        text = longer
    return text


def _list_live_metrics(logs: Mapping[str, float]) -> Iterator[str]:
    """Yield what the live line shows, the most important first: the loss, the speed, the memory, then the rest."""
    if "loss" in logs:
        yield f"loss {logs['loss']:.4g}"
    yield from _format_speed_and_memory(logs)
    for key, label in _LIVE_LABELS.items():
        if key in logs:
            yield f"{label} {logs[key]:.3g}"


def _format_logs(logs: Mapping[str, float]) -> str:
    parts = [f"{key} {value:.4g}" for key, value in logs.items() if key in _LOGGED_KEYS or key.startswith("eval_")]
    return ", ".join([*parts, *_format_speed_and_memory(logs)])


def _format_speed_and_memory(logs: Mapping[str, float]) -> Iterator[str]:
    if "tokens_per_second" in logs:
        yield f"{logs['tokens_per_second']:,.0f} tokens/s"
    if "peak_bytes" in logs:
        yield f"{logs['peak_bytes'] / 1e9:.2f} GB"
