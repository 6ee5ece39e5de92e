"""What the docstrings of the public names promise: examples run, and every error that they list can happen."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kit as lk
from lora_kit import errors
from lora_kit.adapter.adapter import Adapter
from lora_kit.algebra.compare import compare
from lora_kit.data.preparation.prepare import prepare
from lora_kit.exporters.export import check
from tests.support import texts, tiny
from tests.support.raising import CASES

PUBLIC: dict[str, Any] = {
    "attach": lk.attach,
    "adopt": lk.adopt,
    "combine": lk.combine,
    "resize": lk.resize,
    "extract": lk.extract,
    "compare": compare,
    "export": lk.export,
    "check": check,
    "load_base": lk.load_base,
    "prepare": prepare,
    "sweep": lk.sweep,
    **{name: getattr(lk, name) for name in ("evaluate", "merge", "train")},
    "LoraConfig": lk.LoraConfig,
    "Adapter": Adapter,
    **{f"Adapter.{name}": getattr(Adapter, name) for name in ("load", "save")},
    **{f"bank.{name}": value for name, value in inspect.getmembers(lk.AdapterBank)
       if not name.startswith("_") and inspect.isroutine(value)},
}  # fmt: skip
ELSEWHERE = {
    *(f"{name} VerificationError" for name in ("merge", "train", "sweep")),
    "Adapter.load StorageError",
}
"""They take a damaged disk, too little memory, or a training that diverges; other tests see to that."""


def section(doc: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


def listed_errors(name: str) -> set[str]:
    return set(re.findall(r"\b\w+Error\b", section(inspect.getdoc(PUBLIC[name]) or "", "Raises")))


@pytest.fixture
def here(here: Path) -> Path:
    """With another base and a torn adapter as well."""
    tiny.bert().save_pretrained("other-base")
    texts.bert_tokenizer().save_pretrained("other-base")
    torn = Path("adapters/torn")
    shutil.copytree("adapters/sql", torn)
    (torn / "adapter_model.safetensors").write_bytes(b"torn")
    return here


# Examples


WITH_EXAMPLES = [name for name in PUBLIC if section(inspect.getdoc(PUBLIC[name]) or "", "Example")]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_of_a_docstring_runs(name: str, here: Path) -> None:
    base = lk.load_base("kit-base")
    names: dict[str, Any] = {"lk": lk, "torch": torch, "model": base.model, "tokenizer": base.tokenizer}
    if name.startswith("bank."):
        names["bank"] = lk.attach(base.model, slots=2)
        names["bank"].load("sql", "adapters/sql")
    exec(section(inspect.getdoc(PUBLIC[name]) or "", "Example"), names)


def test_there_are_examples() -> None:
    assert len(WITH_EXAMPLES) > 8


# Errors


def listed() -> set[str]:
    """Every error that a docstring lists, with whose it is."""
    return {f"{name} {error}" for name in PUBLIC for error in listed_errors(name)}


def test_every_error_that_is_listed_is_tried() -> None:
    assert listed() - ELSEWHERE == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_an_error_that_is_listed_happens(case: str, here: Path) -> None:
    with pytest.raises(errors.LoraKitError) as caught:
        CASES[case]()
    assert type(caught.value).__name__ == case.split()[1], caught.value
