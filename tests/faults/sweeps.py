"""Faults of a sweep's folder, met by the command that continues it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import lora_kit as lk
from lora_kit.errors import AdapterError, LoraKitError, RecipeError, StorageError
from tests.faults.fault import Act, Fault
from tests.support.training import base_of, recipe_of


def _sweep(folder: Path) -> None:
    recipe = recipe_of(folder, steps=1, train={"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"})
    recipe |= {"data": {"train": "rows.jsonl", "validation": "rows.jsonl"}, "out": "out"}
    with contextlib.chdir(folder):
        lk.sweep(recipe, ["lora.r=2,4"], base=base_of())


@cache
def _finished() -> Path:
    """A sweep that is done, made once."""
    folder = Path(tempfile.mkdtemp(prefix="faults-sweep-"))
    _sweep(folder)
    return folder


def _after(damage: Callable[[Path], object]) -> Act:
    """Return what puts a finished sweep into a folder and damages it."""

    def make(folder: Path) -> None:
        shutil.copytree(_finished(), folder, dirs_exist_ok=True)
        damage(folder / "out.sweep")

    return make


def _append(line: bytes) -> Act:
    def damage(sweep: Path) -> None:
        with open(sweep / "journal.log", "ab") as file:
            file.write(line)

    return _after(damage)


def _in_place(name: str, put: Callable[[Path], object]) -> Act:
    def damage(sweep: Path) -> None:
        path = sweep / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        put(path)

    return _after(damage)


def _rename_key(sweep: Path) -> None:
    journal = sweep / "journal.log"
    journal.write_bytes(journal.read_bytes().replace(b"lora.r", b"lora.q"))


def _row(name: str, make: Act, says: str, *, error: type[LoraKitError] = AdapterError, writes: bool = False) -> Fault:
    return Fault(name=name, make=make, act=_sweep, error=error, says=says, writes=writes)


SWEEPS: tuple[Fault, ...] = (
    _row("a line of a journal that is no JSON", _append(b"garbage\n"), "journal.log is damaged", writes=True),
    _row("a line of a journal that is a list", _append(b"[1]\n"), "journal.log is damaged"),
    _row("a line of a journal of another release", _append(b'{"op_code": 99, "worker_id": "x"}\n'), "is damaged"),
    _row("a line of a journal that lacks a field", _append(b'{"op_code": 4}\n'), "journal.log is damaged"),
    _row("a line of a journal that is not UTF-8", _append(b"\xff\xfe\n"), "journal.log is damaged"),
    _row("a bit of a key in a journal", _after(_rename_key), "journal.log is damaged", writes=True),
    _row("a journal that is a FIFO", _in_place("journal.log", os.mkfifo), "not a regular file"),
    _row("a journal that is a folder", _in_place("journal.log", os.mkdir), "not a regular file"),
    _row(
        "a plan that is no JSON", _in_place("plan.json", lambda path: path.write_text("{")), "JSON", error=RecipeError
    ),
    _row("a plan that is a FIFO", _in_place("plan.json", os.mkfifo), "not a regular file", error=RecipeError),
    _row("locks that are a file", _in_place("locks", lambda path: path.write_text("x")), "way", error=StorageError),
    _row("a lock that is a folder", _in_place("locks/sweep", os.mkdir), "is in the way", error=StorageError),
    _row(
        "a result that was removed",
        _after(lambda sweep: shutil.rmtree(sweep.with_name("out"))),
        "done",
        error=StorageError,
        writes=True,
    ),
)
