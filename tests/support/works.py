"""Work that writes a result over an earlier one: what is killed, or finds the disk full, on its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import lora_kit as lk
from lora_kit.data.preparation.prepare import prepare
from lora_kit.io.atomic_write import write_file
from lora_kit.training.train import train
from tests.support import folders, merging, texts, tiny
from tests.support.training import base_of, recipe_of

Start: TypeAlias = Callable[[Path, int], Callable[[], Any]]
"""Makes the input of a number in a folder; what it returns writes the result to `out` there, over an earlier one."""


def start_prepare(folder: Path, number: int) -> Callable[[], Any]:
    rows = [{"prompt": f"number {n} of {number}", "completion": "word " * 9} for n in range(60)]
    file = texts.write(folder / f"rows-{number}.jsonl", rows)
    return lambda: prepare(file, folder / "out", replace=True)


def start_train(folder: Path, number: int) -> Callable[[], Any]:
    recipe = recipe_of(folder, steps=1, train={"seed": number})
    return lambda: train(recipe, base=base_of(), replace=True)


def start_training_with_checkpoints(folder: Path, number: int) -> Callable[[], Any]:
    recipe = recipe_of(folder, steps=6, train={"seed": number, "save_steps": 1, "save_total_limit": 2})
    return lambda: train(recipe, base=base_of(), replace=True)


def start_sweep(folder: Path, number: int) -> Callable[[], Any]:
    recipe = recipe_of(folder, steps=1, train={"seed": number, "eval_strategy": "steps", "eval_steps": 1})
    return lambda: lk.sweep(recipe, ["lora.r=2,4"], base=base_of(), replace=True)


def start_save(folder: Path, number: int) -> Callable[[], Any]:
    return lambda: folders.adapter(seed=number).save(folder / "out", replace=True)


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


KILLED: Mapping[str, Start] = {
    "save": start_save,
    "training with checkpoints": start_training_with_checkpoints,
    "merge": start_merge,
    "sweep": start_sweep,
    "prepare": start_prepare,
}
"""What is killed at random moments."""
