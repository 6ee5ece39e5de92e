"""SIGINT and SIGTERM while a training runs: it stops where it stands whole, and not in the middle of a step."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, Self

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a training is to stop, asked for by a signal.

    Within the context the first SIGINT or SIGTERM only asks; where the training stands whole, it calls `obey`, and the
    signal does what it would have done. A second one does so at once. A signal that the process ignores stays ignored:
    a shell has what it starts in the background ignore SIGINT.

    Attributes:
        asked: the number of the signal, or None.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if handler is None or handler == signal.SIG_IGN:
                continue
            try:
                signal.signal(number, self._handle_signal)
            except ValueError:  # not the main thread, which signals go to
                return self
            self._before[number] = handler
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        asked = self.asked if error is None else None
        if asked is None:
            self._put_back()
        else:
            self._run_previous_handler(asked)

    def obey(self) -> None:
        """Do what the signal would have done, if there was one.

        Raises:
            KeyboardInterrupt, SystemExit: as the handlers have it that were there before; SystemExit with
                128 + the signal's number where there was none.
        """
        if self.asked is not None:
            self._run_previous_handler(self.asked)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self._run_previous_handler(number)
        self.asked = number
        # What writes to the same stream may have been interrupted in the middle of it.
        with contextlib.suppress(RuntimeError):
            name = signal.Signals(number).name
            logger.warning("%s: this step is done and saved before it stops; once more stops it at once", name)

    def _run_previous_handler(self, number: int) -> None:
        handler = self._before[number]
        self._put_back()
        if callable(handler):
            handler(number, None)
        raise SystemExit(128 + number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
