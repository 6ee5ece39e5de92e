"""SIGINT and SIGTERM during a training: it stops after a complete step with a checkpoint, not in the middle of one."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Final, NoReturn, Self

logger = logging.getLogger(__name__)

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
"""What stops a training."""
_ECHO_SECONDS: Final = 5.0
"""In which a second signal is the first once more: Slurm signals every process, and torchrun passes it on."""


class StopRequest:
    """A request to stop a training, made by a signal.

    In the context the first SIGINT or SIGTERM is only recorded. Once a checkpoint is written the training calls `obey`,
    and the signal takes its usual effect. A second signal takes effect at once; with other processes only after some
    seconds, since a launcher passes on a signal that all have received. A signal that the process ignores stays
    ignored: a shell has background processes ignore SIGINT.

    Args:
        alone: whether no other process trains with this one. With others a signal is only `received`, until they
            `agree` on it.

    Attributes:
        received: number of the signal that this process has received; None before one.
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone
        self.received: int | None = None
        self._received_at = 0.0
        self._obeyed: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int] = {}

    @property
    def signal_number(self) -> int | None:
        """Number of the signal that the training obeys; None before one."""
        return self._obeyed

    def __enter__(self) -> Self:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler is None or handler == signal.SIG_IGN:
                continue
            try:
                signal.signal(number, self._handle_signal)
            except ValueError:  # only the main thread can handle signals
                return self
            self._before[number] = handler
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None and self.signal_number is not None:
            self._run_previous_handler(self.signal_number)
        self._restore_handlers()

    def obey(self) -> None:
        """Let the recorded signal take its usual effect; do nothing without one.

        Raises:
            KeyboardInterrupt, SystemExit: from the handler that was installed before; SystemExit with 128 + the
                signal's number without such a handler.
        """
        if self.signal_number is not None:
            self._run_previous_handler(self.signal_number)

    def agree(self, counts: Sequence[int]) -> None:
        """Take as received what any of the processes has received.

        Args:
            counts: of processes with each of `SIGNALS`.
        """
        for number, count in zip(SIGNALS, counts, strict=True):
            if count:
                self._obeyed = number

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if not self._alone and time.monotonic() - self._received_at < _ECHO_SECONDS:
                return
            self._run_previous_handler(number)
        self.received, self._received_at = number, time.monotonic()
        if self._alone:
            self._obeyed = number
        # The signal may have interrupted another write to the same stream.
        with contextlib.suppress(RuntimeError):
            name = signal.Signals(number).name
            logger.warning("%s: stopping after this step is finished and saved; send it again to stop at once", name)

    def _run_previous_handler(self, number: int) -> NoReturn:
        handler = self._before.get(number)
        self._restore_handlers()
        if callable(handler):
            handler(number, None)
        raise SystemExit(128 + number)

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class TrainingStopped(BaseException):
    """Ends one of several trainings at a signal, after its checkpoint; the process ends when all have."""


class SharedStopRequest(StopRequest):
    """The request of one of several trainings in threads: the signal is that of the main thread's request.

    Args:
        main: the main thread's, which also lets the signal take its effect.
    """

    def __init__(self, main: StopRequest) -> None:
        super().__init__()
        self._main = main

    @property
    def signal_number(self) -> int | None:
        """Number of the signal that the main thread received; None before one."""
        return self._main.signal_number

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        pass

    def obey(self) -> None:
        """End this training, where a signal was received.

        Raises:
            TrainingStopped: it was.
        """
        if self.signal_number is not None:
            raise TrainingStopped
