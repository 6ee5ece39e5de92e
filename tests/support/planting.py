"""Mistakes planted into the code under test, one line each: a check that lets one pass is no check."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from dataclasses import dataclass
from functools import reduce
from types import CodeType
from typing import Any

import pytest


@dataclass(frozen=True)
class Mistake:
    """A piece of a function, and what somebody might have written there.

    Attributes:
        where: `module:function`, `module:Class.function`, without the package's name.
        right: stands in the function's source exactly once.
        wrong: is put there.
    """

    where: str
    right: str
    wrong: str

    def __str__(self) -> str:
        return f"{self.where.rpartition('.')[2]}: {self.wrong}"


def plant(monkeypatch: pytest.MonkeyPatch, mistake: Mistake) -> None:
    """Change the function wherever it is known already: its code is replaced, not its name."""
    module, _, path = mistake.where.partition(":")
    *owners, name = path.split(".")
    owner = reduce(getattr, owners, importlib.import_module(f"lora_kit.{module}"))
    found = inspect.getattr_static(owner, name)
    function: Any = inspect.unwrap(found.__func__ if isinstance(found, staticmethod) else found)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mistake.right) == 1, f"{mistake.where} has changed: plant the mistake in what is there now"
    code = _compiled(source.replace(mistake.right, mistake.wrong), name)
    assert code.co_freevars == function.__code__.co_freevars, f"{mistake.where}: the mistake needs another closure"
    monkeypatch.setattr(function, "__code__", code)


def _compiled(source: str, name: str) -> CodeType:
    """The code of a function as it is within its class: `super()` finds it."""
    around = "from __future__ import annotations\ndef around(__class__):\n" + textwrap.indent(source, "    ")
    outer = next(each for each in compile(around, "<planted>", "exec").co_consts if isinstance(each, CodeType))
    return next(each for each in outer.co_consts if isinstance(each, CodeType) and each.co_name == name)
