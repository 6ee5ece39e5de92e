"""Faults of an output that is an input under some name: with `--replace`, what is read would be gone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

import lora_kit as lk
from lora_kit.data.preparation.prepare import prepare
from lora_kit.errors import ConfigError, ExportError, LoraKitError, MergeError, StorageError
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.generation.generate_file import generate_file
from lora_kit.merging.merge import merge
from lora_kit.training.train import train
from tests.faults.fault import Act, Fault
from tests.support import folders, texts
from tests.support.labeled_bases import POSITIVE_ROWS, save_sentiment_base

ROWS = [{"prompt": f"number {number}", "completion": f"word {number}"} for number in range(8)]


def _rows(folder: Path) -> None:
    texts.write(folder / "rows.jsonl", ROWS)


def _named(name: str, link: Callable[[Path, Path], object]) -> Act:
    """Return what writes rows, and gives them another name."""

    def make(folder: Path) -> None:
        _rows(folder)
        link(folder / "rows.jsonl", folder / name)

    return make


def _link(source: Path, name: Path) -> None:
    name.symlink_to(source)


def _labeled(link: Callable[[Path, Path], object]) -> Act:
    def make(folder: Path) -> None:
        save_sentiment_base(folder / "sentiment")
        texts.write(folder / "rows.jsonl", POSITIVE_ROWS)
        link(folder / "rows.jsonl", folder / "said.jsonl")

    return make


def _adapter(folder: Path) -> None:
    folders.adapter().save(folder / "adapter")
    folders.adapter(seed=1).save(folder / "other")


def _rows_and_adapter(folder: Path) -> None:
    _rows(folder)
    _adapter(folder)


def _adapter_by_link(folder: Path) -> None:
    _adapter(folder)
    (folder / "link").symlink_to("adapter")


def _exported(folder: Path) -> None:
    lk.export(folders.adapter(), "peft", folder / "exported")


def _prepared(folder: Path) -> None:
    _rows(folder)
    prepare(folder / "rows.jsonl", folder / "prepared", base=str(folder / "base"))


def _recipe(**fields: Any) -> Act:
    """Return what writes a recipe whose output is an adapter that is there, with rows in it."""

    def make(folder: Path) -> None:
        _adapter(folder)
        _rows(folder)
        texts.write(folder / "adapter" / "rows.jsonl", ROWS)
        recipe = {"base": "base", "data": {"train": "rows.jsonl"}, "out": "adapter", "train": {"max_steps": 1}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **fields}))

    return make


def _inside(act: Callable[[], object]) -> Act:
    """Return what acts with the folder as the working directory."""

    def run(folder: Path) -> None:
        with contextlib.chdir(folder):
            act()

    return run


def _main(*words: str) -> Act:
    """Return what does a thing that only the command line does, and raises as Python would."""
    from lora_kit.cli.app import app

    return _inside(lambda: app(list(words), exit_on_error=False, print_error=False, result_action="return_value"))


def _evaluate(out: str) -> None:
    evaluate("base", [None], "rows.jsonl", out=out, metrics=["exact_match"], replace=True)


def _row(
    name: str,
    make: Act,
    act: Act | None,
    *command: str,
    says: str = "is an input|inside each other",
    error: type[LoraKitError] = StorageError,
) -> Fault:
    return Fault(name=name, make=make, act=act or _main(*command), error=error, says=says, command=command)


EVAL = ("eval", "rows.jsonl", "--base", "base", "--metrics", "exact_match", "--replace")
GENERATE = ("generate", "--base", "base", "--data", "rows.jsonl", "--replace", "--max-new-tokens", "1")
PREDICT = ("predict", "--base", "sentiment", "--data", "rows.jsonl", "--replace")
PREPARE = ("--base", "base", "--out", "prepared", "--replace")
RESIZE = ("resize", "adapter", "--rank", "2", "--out")
TRAIN = ("train", "recipe.yaml", "--replace")
OVERLAPS: tuple[Fault, ...] = (
    *(
        _row(
            f"answers of eval over its rows, {kind}",
            make,
            _inside(lambda out=out: _evaluate(out)),
            *EVAL,
            "--out",
            out,
        )
        for kind, make, out in (
            ("by their name", _rows, "rows.jsonl"),
            ("by a link", _named("said.jsonl", _link), "said.jsonl"),
            ("by a hard link", _named("said.jsonl", os.link), "said.jsonl"),
            ("by a way around", _rows, "base/../rows.jsonl"),
        )
    ),
    _row("a page of eval over its rows", _named("page.html", os.link), None, *EVAL, "--report", "page.html"),
    _row(
        "answers and page of eval in one file",
        _named("page.html", lambda source, name: name.write_text("old")),
        None,
        *(*EVAL, "--out", "page.html", "--report", "page.html"),
        says="are one file",
        error=ConfigError,
    ),
    *(
        _row(
            f"answers of generate over its prompts, {kind}",
            make,
            _inside(lambda out=out: generate_file("base", [None], "rows.jsonl", out=out, replace=True)),
            *GENERATE,
            "--out",
            out,
        )
        for kind, make, out in (
            ("by a link", _named("said.jsonl", _link), "said.jsonl"),
            ("by a hard link", _named("said.jsonl", os.link), "said.jsonl"),
            ("by the name of the answers so far", _named("said.jsonl.partial", os.link), "said.jsonl"),
        )
    ),
    _row("answers of eval over a file of the base", _rows, None, *EVAL, "--out", "base/config.json"),
    _row(
        "a page of eval in the adapter",
        _rows_and_adapter,
        None,
        *(*EVAL, "-a", "adapter", "--report", "adapter/page.html"),
    ),
    _row(
        "answers of generate in the adapter",
        _rows_and_adapter,
        _inside(lambda: generate_file("base", ["adapter"], "rows.jsonl", out="adapter/said.jsonl", replace=True)),
        *(*GENERATE, "-a", "adapter", "--out", "adapter/said.jsonl"),
    ),
    _row("predictions in the base", _labeled(_link), None, *PREDICT, "--out", "sentiment/said.csv"),
    _row(
        "a page of compare in an adapter",
        _adapter,
        None,
        *("compare", "adapter", "other", "--report", "other/page.html", "--replace"),
    ),
    _row("predictions over their texts, by a link", _labeled(_link), None, *PREDICT, "--out", "said.jsonl"),
    _row("predictions over their texts, by a hard link", _labeled(os.link), None, *PREDICT, "--out", "said.jsonl"),
    _row(
        "prepared rows over those that they are made of",
        _prepared,
        _inside(lambda: prepare("prepared/train.jsonl", "prepared", base="base", replace=True)),
        *("prepare", "prepared/train.jsonl", *PREPARE),
    ),
    _row(
        "prepared rows over their validation",
        _prepared,
        None,
        *("prepare", "rows.jsonl", "--validation", "prepared/train.jsonl", *PREPARE),
    ),
    _row("an adapter converted over itself", _adapter, None, "convert", "adapter", "--out", "adapter", "--replace"),
    _row(
        "an adapter converted over the file that it is made of",
        _adapter,
        None,
        *("convert", "adapter/adapter_model.safetensors", "--out", "adapter", "--replace"),
    ),
    _row(
        "an adapter resized over itself",
        _adapter,
        None,
        *RESIZE,
        "adapter",
        "--replace",
    ),
    _row(
        "an adapter resized through a link to it",
        _adapter_by_link,
        None,
        *["resize", "link", "--rank", "2", "--out", "adapter", "--replace"],
    ),
    _row("an adapter resized in itself", _adapter, None, *RESIZE, "adapter/small"),
    _row(
        "adapters combined over one of them",
        _adapter,
        None,
        *["combine", "-a", "adapter", "-a", "other", "--weight", "1", "--weight", "1", "--out", "other", "--replace"],
    ),
    _row(
        "an export over the export that it is made of",
        _exported,
        lambda folder: lk.export(folder / "exported", "peft", folder / "exported", replace=True),
        *["export", "exported", "--target", "peft", "--out", "exported", "--replace"],
        error=ExportError,
    ),
    _row(
        "a merged model around its base",
        _adapter,
        lambda folder: merge(folder / "base", folder / "adapter", folder, replace=True),
        *["merge", "--base", "base", "--adapter", "adapter", "--out", ".", "--replace"],
        error=MergeError,
    ),
    _row(
        "an extracted adapter in its fine-tune",
        _adapter,
        None,
        *["extract", "--base", "base", "--tuned", "base", "--rank", "2", "--out", "base/adapter"],
    ),
    _row(
        "a training over the adapter that it starts from",
        _recipe(**{"from": "adapter"}),
        _inside(lambda: train("recipe.yaml", replace=True)),
        *TRAIN,
    ),
    _row(
        "a training over the rows that it reads",
        _recipe(data={"train": "adapter/rows.jsonl"}),
        _inside(lambda: train("recipe.yaml", replace=True)),
        *TRAIN,
    ),
    _row(
        "a sweep over the rows that it reads",
        _recipe(data={"train": "rows.jsonl", "validation": "adapter/rows.jsonl"}),
        _inside(lambda: lk.sweep("recipe.yaml", ["lora.r=2,4"], replace=True)),
        *("sweep", "recipe.yaml", "--over", "lora.r=2,4", "--replace"),
    ),
)
