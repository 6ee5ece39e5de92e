"""Work in a process of its own that is killed, interrupted or out of space at a chosen call."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_kit.errors import StorageError
from lora_kit.io import atomic_write

WATCHED = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}
SAVED, REFUSED, RAISED, UNEXPECTED = range(4)


def in_child(work: Callable[[], Any]) -> int:
    """Run work in a process of its own and say how it ended; -9 where it was killed."""
    child = os.fork()
    if child == 0:
        code = UNEXPECTED
        try:
            work()
            code = SAVED
        except StorageError as error:
            code = REFUSED if error.exit_code == 3 else UNEXPECTED
        except KeyboardInterrupt:
            code = RAISED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_call(number: int, act: Callable[[], None], *, below: Path) -> None:
    """From here on, act at the call of this number that touches files below a folder. For children: it stays so."""
    calls = itertools.count(1)

    def step() -> None:
        if next(calls) == number:
            act()

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if event in WATCHED and given and str(below) in str(given[0]):
            step()

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*given: Any, **named: Any) -> Any:
            step()
            result = call(*given, **named)
            if act is not full:  # a call that was done did not fail
                step()
            return result

        return stepping

    def write_bytes(path: Path, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            step()
            file.write(data[len(data) // 2 :])

    sys.addaudithook(watch)
    os.fsync, os.fchmod, fcntl.flock = wrapped(os.fsync), wrapped(os.fchmod), wrapped(fcntl.flock)
    atomic_write._exchange = wrapped(atomic_write._exchange)
    Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]


def die() -> None:
    """Kill this process; nothing runs after it."""
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    """Raise what a full disk raises."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
