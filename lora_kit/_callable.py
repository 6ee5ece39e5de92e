"""Packages that are called by their own name: `lora_kit.merge` is a package, and `lora_kit.merge(...)` merges."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    # Importing a package binds its name in the parent, over a function of that name.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function, for notebooks and editors that ask."""
        return inspect.signature(getattr(self, self.__name__.rpartition(".")[2]))


def make_callable(package: str) -> None:
    """Let a call of an imported package be a call of the function in it that has the package's name."""
    sys.modules[package].__class__ = _CallableModule
