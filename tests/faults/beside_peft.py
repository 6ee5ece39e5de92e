"""What PEFT does with the same files, in a process of its own with limits of time and memory."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import signal
import warnings
from pathlib import Path
from typing import Final

from tests.faults.fault import Act, Fault
from tests.faults.run_fault import make_world

MAX_SECONDS: Final = 20
MAX_BYTES: Final = 2 * 2**30
"""Of data beyond what the process has when it begins."""
HANGS, DIES = "hangs", "dies"
LOADS, WARNS, RAISES = "loads", "loads with a warning", "raises"
OUTCOMES: Final = (LOADS, WARNS, RAISES, HANGS, DIES)


def ask_peft(fault: Fault, folder: Path) -> tuple[str, str] | None:
    """Return what PEFT does, one of `OUTCOMES`, and its error or warning; None where it has nothing like the fault."""
    if fault.peft is None:
        return None
    fault.make(make_world(folder))
    said, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(said)
        _limit_process()
        outcome = _try(fault.peft, folder)
        os.write(write, "\n".join(outcome).encode("utf-8", "replace")[:4_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(said, "rb") as answer:
        text = answer.read().decode("utf-8", "replace")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU)
        return (HANGS, f"after {MAX_SECONDS} s") if late else (DIES, f"of signal {os.WTERMSIG(status)}")
    outcome, _, detail = text.partition("\n")
    return outcome, detail


def _limit_process() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(MAX_SECONDS)
    with open("/proc/self/statm", encoding="ascii") as sizes:
        data = int(sizes.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data + MAX_BYTES, data + MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try(act: Act, folder: Path) -> tuple[str, str]:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("", "peft", "transformers"):
        logging.getLogger(name).addHandler(handler)
    silent = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(silent):
        warnings.simplefilter("always", UserWarning)
        try:
            act(folder)
        except BaseException as error:
            return RAISES, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    lines += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return (WARNS, " ".join(lines[0].split())[:300]) if lines else (LOADS, "")
