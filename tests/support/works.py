"""Work that writes a result over an earlier one: what is killed, or finds the disk full, on its way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.data.preparation.prepare import prepare
from lora_kit.io.atomic_write import write_file
from lora_kit.training.train import train
from tests.support import folders, merging, texts, tiny
from tests.support.labeled_bases import save_sentiment_base
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


def _start_command(*words: str) -> Start:
    """Return what runs a command in the folder, which has a base, two adapters and rows.

    Args:
        words: of the command; those with `{number}` are of the first time, or of the second.
    """

    def start(folder: Path, number: int) -> Callable[[], Any]:
        if not (folder / "base").exists():
            merging.base_folder(folder / "base", tiny.llama())
            (folder / "out").mkdir()
        for each in (1, 2):
            if not (folder / f"adapter-{each}").exists():
                folders.adapter(seed=each).save(folder / f"adapter-{each}")
        prompts = [{"prompt": f"number {n} of {number}", "completion": "word " * (number + 1)} for n in range(9)]
        texts.write(folder / f"rows-{number}.jsonl", prompts)
        argv = [word.format(number=number) for word in words]

        def work() -> int:
            with contextlib.chdir(folder):
                return main(argv)

        return work

    return start


def _stop_clock(start: Start) -> Start:
    """Return the same work, whose result has no measured times in it."""

    def begin(folder: Path, number: int) -> Callable[[], Any]:
        work = start(folder, number)

        def timeless() -> Any:
            with patch("time.perf_counter", return_value=0.0):
                return work()

        return timeless

    return begin


def _start_predict(folder: Path, number: int) -> Callable[[], Any]:
    save_sentiment_base(folder / "base", labels=("positive", "negative"))
    (folder / "out").mkdir(exist_ok=True)
    texts.write(folder / f"rows-{number}.jsonl", [{"text": f"text {number} {n}"} for n in range(99)])
    argv = ["predict", "--data", f"rows-{number}.jsonl", "--base", "base", "--out", "out/said.jsonl", "--replace"]

    def work() -> int:
        with contextlib.chdir(folder):
            return main(argv)

    return work


def _start_extract(folder: Path, number: int) -> Callable[[], Any]:
    base, tuned = folder / "base", folder / f"tuned-{number}"
    if not base.exists():
        merging.base_folder(base, tiny.llama())
    if not tuned.exists():
        lk.merge(base, folders.adapter(seed=number), tuned)
    argv = ["extract", "--base", str(base), "--tuned", str(tuned), "--rank", "2", "--out", str(folder / "out")]
    return lambda: main([*argv, "--replace"])


def _start_init(folder: Path, number: int) -> Callable[[], Any]:
    """The first time leaves nothing: what is there is never replaced."""
    merging.base_folder(folder / "base", tiny.llama())
    argv = ["init", "--task", "answer", "--base", str(folder / "base"), "--out", str(folder / "out")]
    return lambda: main(argv) if number == 2 else 0


_ADAPTER = ("--base", "base", "--adapter", "adapter-{number}")
_start_generate = _start_command(
    *("generate", *_ADAPTER, "--data", "rows-{number}.jsonl", "--out", "out/said.jsonl", "--replace"),
    *("--max-new-tokens", "3", "--batch-size", "2"),
)
KILLED: Mapping[str, Start] = {
    "save": start_save,
    "training with checkpoints": start_training_with_checkpoints,
    "merge": start_merge,
    "sweep": start_sweep,
    "prepare": start_prepare,
    "generate --data": _start_generate,
}
"""What is killed at random moments."""
FILLED: Mapping[str, Start] = {
    "save": start_save,
    "train": start_train,
    "training with checkpoints": start_training_with_checkpoints,
    "sweep": start_sweep,
    "merge": start_merge,
    "export": start_export,
    "export of a merged model": _start_command(
        "export", "adapter-{number}", "--target", "merged", "--base", "base", "--out", "out", "--replace"
    ),
    "combine": _start_command(
        "combine",
        "-a",
        "adapter-1",
        "-a",
        "adapter-{number}",
        "--weight",
        "0.5",
        "--weight",
        "2",
        "--out",
        "out",
        "--replace",
    ),
    "resize": _start_command("resize", "adapter-{number}", "--rank", "2", "--out", "out", "--replace"),
    "convert": _start_command("convert", "adapter-{number}", "--out", "out", "--replace"),
    "extract": _start_extract,
    "prepare": start_prepare,
    "init": _start_init,
    "generate --data": _start_generate,
    "predict --out": _start_predict,
    "eval --out": _start_command(
        *("eval", "rows-{number}.jsonl", *_ADAPTER, "--metrics", "exact_match", "--max-new-tokens", "2"),
        *("--out", "out/said.jsonl", "--replace"),
    ),
    "eval --out --report": _stop_clock(
        _start_command(
            *("eval", "rows-{number}.jsonl", *_ADAPTER, "--metrics", "exact_match", "--max-new-tokens", "2"),
            *("--out", "out/said.jsonl", "--report", "out/page.html", "--replace"),
        )
    ),
    "compare --report": _start_command(
        "compare", "adapter-1", "adapter-{number}", "--report", "out/page.html", "--replace"
    ),
}
"""What finds the disk full at every point of its way."""
