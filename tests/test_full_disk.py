"""A full disk: it is said with path and bytes, the old result is whole, and the same work ends once there is space."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.data.preparation.prepare import prepare
from lora_kit.io.atomic_write import write_file
from lora_kit.training.train import train
from tests.support import folders, merging, texts, tiny
from tests.support.full_disk import run_on_full_disk
from tests.support.merging import contents
from tests.support.training import base_of, recipe_of

Work = Callable[[Path, int], Callable[[], Any]]
"""Makes the input of a number in a folder; what it returns writes the result to `out` there, over an earlier one."""


def start_prepare(folder: Path, number: int) -> Callable[[], Any]:
    rows = [{"prompt": f"number {n} of {number}", "completion": "word " * 9} for n in range(60)]
    file = texts.write(folder / f"rows-{number}.jsonl", rows)
    return lambda: prepare(file, folder / "out", replace=True)


def start_train(folder: Path, number: int) -> Callable[[], Any]:
    recipe = recipe_of(folder, steps=1, train={"seed": number})
    return lambda: train(recipe, base=base_of(), replace=True)


def start_sweep(folder: Path, number: int) -> Callable[[], Any]:
    pytest.importorskip("optuna", reason="optuna is not installed (pip install 'lora-kit[sweep]')")
    recipe = recipe_of(folder, steps=1, train={"seed": number, "eval_strategy": "steps", "eval_steps": 1})
    return lambda: lk.sweep(recipe, ["lora.r=2,4"], base=base_of(), replace=True)


def start_export(folder: Path, number: int) -> Callable[[], Any]:
    return lambda: lk.export(folders.adapter(seed=number), "vllm", folder / "out", replace=True)


def start_merge(folder: Path, number: int) -> Callable[[], Any]:
    base, adapter = folder / "base", folder / f"adapter-{number}"
    if not base.exists():
        merging.base_folder(base, tiny.llama())
    if not adapter.exists():
        folders.adapter(seed=number).save(adapter)
    return lambda: lk.merge(base, adapter, folder / "out", replace=True)


def start_write(folder: Path, number: int) -> Callable[[], Any]:
    (folder / "out").mkdir(exist_ok=True)
    return lambda: write_file(folder / "out" / "predictions.jsonl", f"{number}\n".encode() * 5_000)


WORK: dict[str, tuple[Work, tuple[int, ...]]] = {
    "prepare": (start_prepare, (0, 1_000)),
    "train": (start_train, (0, 1_000, 6_000)),
    "sweep": (start_sweep, (0, 600, 6_000)),
    "export": (start_export, (0, 1_000)),
    "merge": (start_merge, (0, 2_000, 20_000)),
    "a file": (start_write, (0, 1_000)),
}
"""What writes, and the bytes that a file may have while the disk is full: at its first write, and at later ones."""


@pytest.mark.parametrize("name", WORK)
def test_a_full_disk_is_said_and_nothing_old_is_lost(tmp_path: Path, name: str) -> None:
    work, limits = WORK[name]
    work(tmp_path, 1)()
    before = contents(tmp_path / "out")
    for largest in limits:
        code, message = run_on_full_disk(work(tmp_path, 2), largest=largest)
        assert code == 3, largest
        assert re.search(rf"{re.escape(str(tmp_path))}\S* cannot be written: File too large", message), (
            largest,
            message,
        )
        assert re.search(r"[\d,]+ bytes are needed", message), (largest, message)
        assert contents(tmp_path / "out") == before
        assert not [path for path in tmp_path.glob(".*") if path.name.endswith(".staging")]
    work(tmp_path, 2)()
    after = contents(tmp_path / "out")
    assert after != before
    assert after.keys() == before.keys()
