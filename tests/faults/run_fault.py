"""Meet one fault in Python and on the command line, and say what was not as it must be."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType

from lora_kit.cli.main import main
from lora_kit.errors import LoraKitError
from tests.faults.fault import Fault
from tests.support import merging, tiny
from tools.fuzz_readers import MAX_MESSAGE

MAX_SECONDS = 60
"""Of computing and waiting, for one fault in one way."""
_MAX_LINES = 20


class _NoEndError(BaseException):
    """It took too long; no `except Exception` catches it."""


def reason_lost(fault: Fault, folder: Path) -> str | None:
    """Return why a fault was not survived, or None: another outcome, or a folder that is not as it was."""
    fault.make(make_world(folder))
    before = take_stock(folder)
    ways = (_reason_lost_in_python, _reason_lost_on_command_line)
    for way in ways if fault.command else ways[:1]:
        with _limit_time(), fault.during(folder):
            reason = way(fault, folder)
        reason = reason or _reason_check_fails(fault, folder)
        after = take_stock(folder)
        if reason is None and not fault.writes and after != before:
            changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
            reason = f"changed: {', '.join(sorted(changed))}"
        if reason is not None:
            return f"{way.__name__.removeprefix('_reason_lost_').replace('_', ' ')}: {reason}"
    return None


@cache
def _world() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    merging.base_folder(folder / "base", tiny.llama())
    return folder


def make_world(folder: Path) -> Path:
    """Put a tiny base into a folder, and return the folder."""
    shutil.copytree(_world(), folder, dirs_exist_ok=True)
    return folder


def _reason_lost_in_python(fault: Fault, folder: Path) -> str | None:
    try:
        fault.act(folder)
    except LoraKitError as error:
        if fault.error is None:
            return f"{type(error).__name__}: {error}"
        return _reason_wrong_error(fault, error)
    except AssertionError as error:
        return f"not so: {error}"
    except _NoEndError:
        return f"no end after {MAX_SECONDS} s"
    except BaseException as error:
        return f"untyped {type(error).__name__}: {error}"
    return None if fault.error is None else "no error"


def _reason_wrong_error(fault: Fault, error: LoraKitError) -> str | None:
    assert fault.error is not None
    text = str(error)
    if not isinstance(error, fault.error):
        return f"{type(error).__name__}, not {fault.error.__name__}: {text}"
    if not re.search(fault.says, text, re.DOTALL):
        return f"the error does not say {fault.says!r}: {text}"
    lines = text.splitlines()
    if len(lines) > _MAX_LINES or max(map(len, lines)) > MAX_MESSAGE + 200:  # of which a path takes some
        return f"an error of {len(text)} characters in {len(lines)} lines"
    return None


def _reason_lost_on_command_line(fault: Fault, folder: Path) -> str | None:
    out, err = io.StringIO(), io.StringIO()
    expected = fault.error.exit_code if fault.error else 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(fault.command)
        except _NoEndError:
            return f"no end after {MAX_SECONDS} s"
    lines = err.getvalue().splitlines()
    if code != expected:
        return f"exit code {code}, not {expected}: {err.getvalue()[-500:]}"
    if "Traceback" in err.getvalue() or sum(line.startswith("error: ") for line in lines) != (code != 0):
        return f"not one line on stderr: {err.getvalue()[-500:]}"
    if not re.search(fault.says, err.getvalue(), re.DOTALL):
        return f"stderr does not say {fault.says!r}: {err.getvalue()[-500:]}"
    return None


def _reason_check_fails(fault: Fault, folder: Path) -> str | None:
    try:
        if fault.check is not None:
            fault.check(folder)
    except AssertionError as error:
        return f"not so afterwards: {error}"
    return None


def take_stock(folder: Path) -> dict[str, object]:
    """Return what is below a folder: kind, permission and content of everything, by relative path."""
    found: dict[str, object] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            facts = os.lstat(path)
            content: object = None
            if stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(facts.st_mode):
                content = path.read_bytes() if facts.st_size < 2**20 else (facts.st_size, facts.st_mtime_ns)
            found[str(path.relative_to(folder))] = (facts.st_mode, content)
    return found


@contextlib.contextmanager
def _limit_time() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _NoEndError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
