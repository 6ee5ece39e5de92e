"""Threads that notice when another process of a training is gone without a word.

Where a process is killed, its connections close and the others see it at once. Where its machine is cut off, nothing
arrives any more, and what waits for it cannot be interrupted: then the process is ended from here.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Final

import torch.distributed as dist

BEAT_SECONDS: Final = 5.0
LOST_SECONDS: Final = 45.0
"""Silence after which a process counts as lost. A process beats while it loads, computes and writes."""


class Heartbeat:
    """Beats in a store, and calls `on_lost` once where another process has not beaten for too long.

    Args:
        store: a connection of its own, which no other call blocks.
        rank: number of this process, from 0.
        size: number of processes.
        on_lost: called in the thread with the number of the lost process; None where the store is gone.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        on_lost: Callable[[int | None], None],
        beat_seconds: float = BEAT_SECONDS,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        self._store, self._rank, self._on_lost = store, rank, on_lost
        self._beat_seconds, self._lost_seconds = beat_seconds, lost_seconds
        self._others = [other for other in range(size) if other != rank]
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._answered = time.monotonic()
        # The first may wait in the store without an end, where the network is cut.
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._watch)]

    def start(self) -> None:
        """Begin to beat."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Beat no more; the others must have stopped looking, or take this process for lost."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(self._beat_seconds)

    def _beat(self) -> None:
        for beat in itertools.count():
            with contextlib.suppress(RuntimeError):
                self._store.set(f"beat/{self._rank}", str(beat))
                for other in self._others:
                    self._look_at(other)
                self._answered = time.monotonic()
            if self._stopped.wait(self._beat_seconds):
                return

    def _look_at(self, other: int) -> None:
        """Note when a process was seen to beat; before its first beat it counts from now."""
        key = f"beat/{other}"
        beat = self._store.get(key) if self._store.check([key]) else b""
        if self._seen.get(other, (None, 0.0))[0] != beat:
            self._seen[other] = beat, time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(self._beat_seconds):
            earliest = time.monotonic() - self._lost_seconds
            lost = [other for other, (_, at) in list(self._seen.items()) if at < earliest]
            if lost or self._answered < earliest:
                self._on_lost(lost[0] if lost and self._answered >= earliest else None)
                return
