"""The scripts of examples/, as modules: they are run as a person runs them, from their own folder."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.support.pages import ROOT

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    """Return a script as a module whose `__name__` is its own, so that it does not start by itself."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module
