"""A row of the table of faults: what is wrong, what is done with it, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from lora_kit.errors import LoraKitError

Act = Callable[[Path], object]
"""Works in a folder: makes the fault there, or does what meets it."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        name: in words.
        make: makes it in a folder that has a tiny `base` with its tokenizer.
        act: meets it in Python; where no error is expected it asserts what must be true.
        error: that must come of it; None where it is survived without one.
        says: a regular expression in the error or, without one, in the warnings of the command; empty for anything.
        command: the same on the command line, run in the folder; empty where there is no command for it.
        writes: whether what is expected changes the folder.
        during: opens, in the folder, what goes on around the act and around the command.
        check: asserts what must be true of the folder after the act, and after the command.
        peft: does the same with PEFT, on the same files; None where PEFT has nothing like it.
        slow: left out of `make test`.
    """

    name: str
    make: Act
    act: Act
    error: type[LoraKitError] | None = None
    says: str = ""
    command: tuple[str, ...] = ()
    writes: bool = False
    during: Callable[[Path], AbstractContextManager[object]] = nullcontext
    check: Act | None = None
    peft: Act | None = None
    slow: bool = False


def no_files(folder: Path) -> None:
    """Make nothing: the fault is in what is done."""
