"""What editors, notebooks and type checkers see of the package, whose names are imported when they are first used."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

import lora_kit as lk

FUNCTIONS = [name for name in lk.__all__ if callable(getattr(lk, name)) and not inspect.isclass(getattr(lk, name))]


def seen_by_type_checkers() -> dict[str, str]:
    """Names that are imported for type checkers alone, and from where."""
    tree = ast.parse(Path(lk.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_type_checkers_see_every_public_name() -> None:
    assert {"__version__", *seen_by_type_checkers()} == set(lk.__all__)
    assert (Path(lk.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(set(lk.__all__) - {"__version__", "data"}))
def test_no_module_can_be_taken_for_a_public_name(name: str) -> None:
    """mypy takes `package.name` for the module of that name where there is one, and a module cannot be called."""
    home = seen_by_type_checkers()[name]
    assert getattr(importlib.import_module(home), name) is not None
    package = importlib.util.find_spec(home)
    assert package is not None
    assert not [place for place in package.submodule_search_locations or () if (Path(place) / f"{name}.py").exists()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_signature_of_a_public_function_is_told(name: str) -> None:
    value = getattr(lk, name)
    function = getattr(value, name) if isinstance(value, ModuleType) else value
    assert inspect.signature(value) == inspect.signature(function)
    assert not {"args", "kwargs"} & set(inspect.signature(value).parameters)


def test_completion_offers_the_public_names_and_no_others() -> None:
    assert sorted(lk.__all__) == dir(lk)


def test_a_config_takes_for_type_checkers_what_it_has() -> None:
    """Its `__init__` is written out for them, since lists may be given where tuples are kept."""
    tree = ast.parse(Path(inspect.getfile(lk.LoraConfig)).read_text("utf-8"))
    written = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert [argument.arg for argument in written.args.kwonlyargs] == [each.name for each in fields(lk.LoraConfig)]
