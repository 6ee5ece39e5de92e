"""Values that processes pass to each other through their launcher's key-value store.

A process that waits for a value looks whether the one that owes it is still there.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
import torch.distributed as dist

FAILURE: Final = "failure"
"""The key under which the first error of a process is; whoever waits for something else stops."""
_POLL_SECONDS: Final = (0.0005, 0.02)
"""Least and most time between two looks at the store. To wait in the store would print a warning of torch's own."""
_ALIVE_SECONDS: Final = 1.0
_PART: Final = 2**22
"""Bytes under one key of a store, which takes 8 MiB at most."""

Address: TypeAlias = tuple[str, int]
"""The system that a process runs in, and its number there."""


class PeerError(Exception):
    """Another process has failed, or was lost."""


class StoreExchange:
    """Values by key in a store.

    Args:
        store: of the launcher.

    Attributes:
        addresses: of the other processes, as far as they are known.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._own_keys: list[str] = []
        self.addresses: list[Address] = []

    def put(self, key: str, value: object) -> None:
        """Give a value to the other processes."""
        data = pickle.dumps(value)
        parts = [data[start : start + _PART] for start in range(0, len(data), _PART)]
        with translate_loss():
            for number, part in enumerate(parts):
                self._store.set(f"{key}.{number}", part)  # type: ignore[arg-type] # torch takes bytes, too
            self._store.set(key, str(len(parts)))
        self._own_keys += [key, *(f"{key}.{number}" for number in range(len(parts)))]

    def take(self, key: str) -> Any:
        """Wait for the value that another process gives, and return it.

        Raises:
            PeerError: another process has failed, or was lost.
        """
        with translate_loss():
            self.wait(key)
            count = int(self._store.get(key))
            data = b"".join(self._store.get(f"{key}.{number}") for number in range(count))
        return pickle.loads(data)

    def take_own_keys(self) -> list[str]:
        """Return the keys that were put since the last call."""
        keys, self._own_keys = self._own_keys, []
        return keys

    def delete(self, keys: list[str]) -> None:
        """Delete values that every process has taken."""
        for key in keys:
            self._store.delete_key(key)

    def claim(self, key: str, value: object) -> Any:
        """Set a value unless there is one, and return the one that is there."""
        return pickle.loads(self._store.compare_set(key, "", pickle.dumps(value)))  # type: ignore[arg-type]

    def wait(self, key: str, *, seconds: float = math.inf) -> bool:
        """Wait for a key; return whether it is there.

        Args:
            seconds: to wait, at most; without an end it is an error where no process can set the key any more.

        Raises:
            PeerError: another process has failed, or was lost.
        """
        pause, most = _POLL_SECONDS
        begin = looked = time.monotonic()
        while not self._store.check([key]):
            now = time.monotonic()
            if now - begin > seconds:
                return False
            if seconds == math.inf and self._store.check([FAILURE]):
                raise PeerError("another process has failed")
            if seconds == math.inf and now - looked > _ALIVE_SECONDS:
                looked = now
                if self.has_gone():
                    raise PeerError("another process has ended")
            time.sleep(pause)
            pause = min(2 * pause, most)
        return True

    def has_gone(self) -> bool:
        """Return whether another process of this system has ended."""
        system, _ = find_address()
        return any(not _is_running(number) for other, number in self.addresses if other == system)


def find_address() -> Address:
    """Return where this process runs. A container has process numbers of its own."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        return f"{boot.read_text().strip()}/{namespace.stat().st_ino}", os.getpid()
    return f"unknown/{os.getpid()}", os.getpid()


def _is_running(number: int) -> bool:
    """Return whether a process of this system runs; one that has ended may still have its number."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    return False


@contextlib.contextmanager
def translate_loss() -> Iterator[None]:
    """Raise a PeerError for what torch raises where another process is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(str(error)) from error
