"""How a command lives in its process: streams, signals, logs."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final, TextIO

from lora_kit.cli.output import print_notice
from lora_kit.errors import VerificationError
from lora_kit.io.text import escape_for_terminal
from lora_kit.models.silence import use_log_level
from lora_kit.names import THREAD_PREFIX

_NEW_OBJECTS: Final = 5_000
"""After how many new objects Python looks for garbage; its own 700 are too few while large libraries are imported."""


class _SteadyStream:
    """A text stream that discards what is written once its reader has left.

    A command whose reader has left (`| head -1`) finishes its work instead of failing in the middle of it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            # A locale that cannot show a character must not stop a command either.
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._ignore_broken_pipe():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignore_broken_pipe():
            self._stream.flush()

    @contextlib.contextmanager
    def _ignore_broken_pipe(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What is buffered would fail again at exit: the descriptor itself is redirected.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def protect_streams() -> Iterator[None]:
    """Let no standard stream make a command fail: closed, broken, or in a narrow encoding."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        steady = [_SteadyStream(stream or stack.enter_context(open(os.devnull, "w"))) for stream in before]
        sys.stdout, sys.stderr = steady
        try:
            yield
        finally:
            for stream in steady:
                # What could not be written was an error above, or belongs to an error that is being raised.
                with contextlib.suppress(OSError):
                    stream.flush()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def handle_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as SIGINT does: through its clean-up, with exit code 143."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which handles the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def collect_garbage_less_often() -> Iterator[None]:
    """Let Python look for garbage less often in the block, and not at its own end.

    torch and transformers make 400,000 objects when they are imported, all of which stay. To look through them again
    and again, and once more at the end, took a quarter of the processor time of a short command.
    """
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], _NEW_OBJECTS) if before[0] else 0, *before[1:])
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def log_to_stderr(*, debug: bool, strict: bool = False) -> Iterator[None]:
    """Print warnings of the library on stderr, each once; with `--debug` everything it logs.

    Args:
        strict: a warning is raised as an error, where it is noticed.

    Raises:
        VerificationError: in the block, with `strict`.
    """
    import logging

    shown = set[str]()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                if strict:
                    raise VerificationError(record.getMessage(), hint="without --strict this is a warning")
                if record.getMessage() in shown:
                    return
                shown.add(record.getMessage())
            # Several trainings in one process run in threads of their own, which are called as their adapters.
            owner = f"{record.threadName}: " if str(record.threadName).startswith(THREAD_PREFIX) else ""
            message = owner + record.getMessage()
            if record.levelno == logging.INFO:
                print(escape_for_terminal(message), file=sys.stderr)
            else:
                print_notice(record.levelname.lower(), message)

    logger, handler = logging.getLogger("lora_kit"), Lines()
    logger.addHandler(handler)
    try:
        with use_log_level("lora_kit", logging.DEBUG if debug else logging.WARNING):
            yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def show_progress_lines() -> Iterator[None]:
    """Log progress in lines where there is no terminal for a bar."""
    import logging

    before = logging.getLogger("lora_kit").level
    with use_log_level("lora_kit", before if sys.stderr.isatty() else min(before, logging.INFO)):
        yield
