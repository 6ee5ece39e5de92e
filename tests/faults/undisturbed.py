"""Work that writes a result, done in processes of their own: what it gives where nobody disturbs it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.errors import LoraKitError
from lora_kit.generation.generate_file import PARTIAL_SUFFIX
from tests.support.merging import contents
from tests.support.works import Start

_BESIDE: Final = re.compile(rf"\..+\.(lock|lora_kit-\d+)|.+{re.escape(PARTIAL_SUFFIX)}")
"""Names of what may stand beside a result that is a file."""
_LEFT_BEHIND: Final = re.compile(r"\.(staging|replaced|lora_kit-\d+)$")


@dataclass(frozen=True)
class Undisturbed:
    """What a work gives where nobody disturbs it.

    Attributes:
        old: the files of the earlier result.
        new: the files of the result.
        decisive: those of them that are the same each time; what a clock is in differs.
        seconds: that it took.
    """

    old: dict[str, bytes]
    new: dict[str, bytes]
    decisive: tuple[str, ...]
    seconds: float

    def is_old(self, found: dict[str, bytes]) -> bool:
        """Return whether a result is the earlier one, byte for byte."""
        return found == self.old

    def is_new(self, found: dict[str, bytes]) -> bool:
        """Return whether a result is the new one: the same names, in which no file is the earlier one, and those that
        decide with the same bytes."""
        stale = [file for file in found if found[file] == self.old.get(file) != self.new.get(file)]
        return (
            found.keys() == self.new.keys()
            and not stale
            and all(found[each] == self.new[each] for each in self.decisive)
        )


def read_result(place: Path) -> dict[str, bytes]:
    """Return the files of the result in a folder: without locks, and what a process that died had begun to write."""
    return {name: data for name, data in contents(place / "out").items() if not _BESIDE.fullmatch(Path(name).name)}


def list_leftovers(place: Path) -> list[str]:
    """Return the names of what a writer that died has left anywhere below a folder."""
    return [path.name for path in place.rglob(".*") if _LEFT_BEHIND.search(path.name)]


def measure_undisturbed(start: Start, place: Path, ready: Path) -> Undisturbed:
    """Do a work twice over the same earlier result, which is in `place`; a copy of that is left in `ready`.

    The copies are made back under the name of `place`, which is in some files.
    """
    old = read_result(place)
    shutil.copytree(place, ready)
    results, seconds = [], 0.0
    for _ in range(2):
        put_back(ready, place)
        began = time.monotonic()
        code, said = wait_for(fork_work(start(place, 2)))
        assert code == 0, f"the work fails undisturbed: {said}"
        seconds = time.monotonic() - began
        results.append(read_result(place))
    new, again = results
    decisive = tuple(file for file in new if new[file] == again.get(file))
    assert any(new[file] != old.get(file) for file in decisive), "the two results have to differ"
    return Undisturbed(old, new, decisive, seconds)


def put_back(ready: Path, place: Path) -> None:
    """Make a folder a copy of another."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(ready, place, symlinks=True)


def fork_work(work: Callable[[], Any]) -> tuple[int, int]:
    """Start work in a process of its own; return its id, and a descriptor of what it will say.

    It ends with the exit code of its error; with what it returns, where that is one; else with 0.
    """
    said, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, said
    code = 1
    try:
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            result = work()
        code = result if isinstance(result, int) else 0
        text = err.getvalue()
    except LoraKitError as error:
        code, text = error.exit_code, str(error)
    except BaseException:
        text = traceback.format_exc(limit=-3)
    finally:
        with contextlib.suppress(OSError):
            os.write(write, text.encode()[-4_000:])
        os._exit(code)


def wait_for(child: tuple[int, int]) -> tuple[int, str]:
    """Wait for a process of `fork_work`; return its exit code, negative where a signal ended it, and what it said."""
    number, said = child
    with os.fdopen(said, "rb") as stream:
        text = stream.read().decode("utf-8", "replace")
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), text
