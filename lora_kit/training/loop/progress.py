"""A live line on stderr where that is a terminal, and lines in the log everywhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

import transformers

logger = logging.getLogger(__name__)

MIN_LOG_SECONDS: Final = 5.0
"""Between two lines of the log that say how far a training is; what an evaluation found is always said."""
_LOGGED_KEYS: Final = ("loss", "learning_rate", "grad_norm")


class Progress(transformers.TrainerCallback):
    """Says how far a training is, how long it will take, how fast it is and how much memory it needs."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._began, self._first_step = 0.0, 0
        self._said = float("-inf")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        shown = TextColumn("{task.fields[shown]}", markup=False)
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(), shown)
        self._bar = Bar(*columns, console=console, disable=args.disable_tqdm or not console.is_terminal)
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, shown="")
        self._bar.start()
        self._began, self._first_step = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)
        # The last interval is logged too when it is a short one.
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        shown = _format_logs(logs)
        if not shown:
            return
        if self._bar is not None and "loss" in logs:
            self._bar.update(self._task, shown=shown)
        now = time.perf_counter()
        if "loss" not in logs or now - self._said >= MIN_LOG_SECONDS or state.global_step >= state.max_steps:
            self._said = now
            logger.info(
                "step %d of %d: %s%s", state.global_step, state.max_steps, shown, self._format_time_left(state, now)
            )

    def _format_time_left(self, state: Any, now: float) -> str:
        """The time that is left, once there is a step to tell it by."""
        done = state.global_step - self._first_step
        if done < 1 or state.global_step >= state.max_steps:
            return ""
        seconds = (now - self._began) / done * (state.max_steps - state.global_step)
        return f", {timedelta(seconds=round(seconds))} left"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # So is the one in which a training is stopped early.
        control.should_log = control.should_log or control.should_training_stop

    def close(self) -> None:
        """Take the live line off the terminal."""
        if self._bar is not None:
            self._bar.stop()


def _format_logs(logs: Mapping[str, Any]) -> str:
    parts = [f"{key} {value:.4g}" for key, value in logs.items() if key in _LOGGED_KEYS or key.startswith("eval_")]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "peak_bytes" in logs:
        parts.append(f"{logs['peak_bytes'] / 1e9:.2f} GB")
    return ", ".join(parts)
