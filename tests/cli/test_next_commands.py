"""Every command that a verb prints runs as it is printed, on a base that is a folder."""

from __future__ import annotations

import html
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_kit.cli.main import main
from lora_kit.models.locate import KIT_FOLDER
from tests.support import texts

Capture = pytest.CaptureFixture[str]

ROWS: dict[str, list[dict[str, Any]]] = {
    "completion": [{"prompt": f"ask {n}", "completion": f"say {n};"} for n in range(40)],
    "label": [{"text": f"where is card {n}", "label": "card"} for n in range(20)]
    + [{"text": f"send {n} pounds", "label": "money"} for n in range(20)],
    "chat": [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]}
        for n in range(40)
    ],
    "text": [{"text": f"text number {n} of some length"} for n in range(40)],
}
FAST = ["--train.max_steps", "2", "--train.per_device_train_batch_size", "4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose name needs quotes, with a base in a folder."""
    work = tmp_path / "a folder's name"
    shutil.copytree(KIT_FOLDER, work / "my base", ignore=shutil.ignore_patterns("__pycache__", "*.py", "training.json"))
    monkeypatch.chdir(work)
    return work


def run(capsys: Capture, *arguments: str) -> str:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0, f"lora-kit {shlex.join(arguments)}: {err}"
    return out


def commands_in(printed: str) -> Iterator[list[str]]:
    """The arguments of every command on a line of its own."""
    for line in re.findall(r"^\s*lora-kit [a-z].*$", printed, re.MULTILINE):
        yield shlex.split(line)[1:]


def run_commands_of_page(page: Path, capsys: Capture) -> None:
    commands = list(commands_in(html.unescape(re.sub(r"<[^>]+>", "\n", page.read_text("utf-8")))))
    assert commands, "the page shows how the result is used"
    for command in commands:
        run(capsys, *command)


@pytest.mark.parametrize("layout", ROWS)
def test_from_rows_to_answers_every_command_runs_as_printed(here: Path, capsys: Capture, layout: str) -> None:
    texts.write(here / "my rows.jsonl", ROWS[layout])
    out = run(capsys, "prepare", "my rows.jsonl", "--base", "my base", "--out", "my data")
    commands = list(commands_in(out))
    assert [verb for verb, *_ in commands] == ["preview", "train"]
    run(capsys, *commands[0])
    out = run(capsys, *commands[1], *FAST)
    commands = list(commands_in(out))
    assert [verb for verb, *_ in commands] == ["eval", "predict" if layout == "label" else "generate"]
    for command in commands:
        run(capsys, *command)
    texts.write(here / "rows.jsonl", ROWS[layout][:2])
    run_commands_of_page(next(here.glob("adapters/*/report.html")), capsys)


def test_what_is_made_of_a_trained_adapter_needs_no_base_named(here: Path, capsys: Capture) -> None:
    texts.write(here / "rows.jsonl", ROWS["completion"])
    run(capsys, "prepare", "rows.jsonl", "--base", "my base", "--out", "data")
    run(capsys, "train", "data/recipe.yaml", *FAST)
    for arguments in (
        ["merge", "--adapter", "data", "--out", "merged", "--dtype", "float32"],
        ["export", "data", "--target", "merged", "--out", "exported", "--allow", "lost-delta"],
        ["export", "data", "--target", "peft", "--out", "for peft"],
        ["convert", "for peft", "--out", "converted"],
        ["inspect", "data"],
        ["list"],
    ):
        for command in commands_in(run(capsys, *arguments)):
            run(capsys, *command)


@pytest.mark.parametrize("method", ["features", "full"])
def test_other_methods(here: Path, capsys: Capture, method: str) -> None:
    texts.write(here / "rows.jsonl", ROWS["label"])
    recipe = {
        "base": "my base",
        "out": "my adapter",
        "task": "classify",
        "method": method,
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl"},
        "train": {"max_steps": 2},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    for command in commands_in(run(capsys, "train", "recipe.yaml")):
        run(capsys, *command)
    run_commands_of_page(Path("my adapter", "report.html"), capsys)
