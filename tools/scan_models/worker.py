"""A process that tries one class after another, and is ended when one takes too long or too much memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import torch
import transformers

from tools.scan_models.trial import CUT, NOT_TRIED, Outcome, try_class

CPU_SECONDS: Final = 60
"""A class may take so much time of a processor, and ten times as long on a busy machine."""
MEMORY_BYTES: Final = 4 * 2**30
"""A class may take so much memory more than the process has at its start."""
_CLASSES_PER_PROCESS: Final = 40
"""Then a new process begins: what one class changes in the libraries must not reach far."""
_OUT_OF_CPU: Final = -24
"""How a process ends that took more time than it may: by SIGXCPU."""


class Worker:
    """Tries classes in a process of its own, so that a crash or a hang is an outcome."""

    def __init__(self) -> None:
        self._count = 0
        self._start()

    def try_class(self, name: str) -> Outcome:
        """Return the outcome of a class of transformers."""
        self._count += 1
        if self._count > _CLASSES_PER_PROCESS:
            self.close()
            self._start()
        self._pipe.send(name)
        try:
            if self._pipe.poll(10 * CPU_SECONDS):
                answer: Outcome = self._pipe.recv()
                return answer
            reason = f"no answer within {10 * CPU_SECONDS} seconds"
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            reason = f"more than {CPU_SECONDS} s" if code == _OUT_OF_CPU else f"the process ended with {code}"
        self.close()
        self._start()
        return Outcome(CUT, reason)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> None:
        self._count = 0
        self._pipe, other = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=_answer, args=(other,), daemon=True)
        self._process.start()
        other.close()


def _answer(pipe: Connection) -> None:
    """Try each class that comes through the pipe."""
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    gc.freeze()  # what the parent made stays, and need not be searched for garbage after every class
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 2)
        os.dup2(silence.fileno(), 1)
        while True:
            name = pipe.recv()
            used = int(time.process_time())
            resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, resource.RLIM_INFINITY))
            pipe.send(_try_name(name))
            gc.collect()


def _try_name(name: str) -> Outcome:
    try:
        kind = getattr(transformers, name)
    except Exception as error:  # a library that the class needs is not installed
        return Outcome(NOT_TRIED, f"it cannot be imported: {error}".splitlines()[0][:160])
    return try_class(kind)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
