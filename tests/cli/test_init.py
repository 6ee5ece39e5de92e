"""`init` begins a project: what it writes trains as it is, and each command that it prints runs."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_kit.cli.main import main
from lora_kit.data.preparation import start_project
from lora_kit.data.preparation.example_rows import GOALS, render_example
from lora_kit.errors import StorageError
from tests.support.long_runs import take_few

Capture = pytest.CaptureFixture[str]
FAST = ["--train.max_steps", "2", "--train.num_train_epochs", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and a standard input that is no terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


class Terminal(io.StringIO):
    """A standard input on which a person types."""

    def isatty(self) -> bool:
        return True


def list_commands(printed: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  lora-kit ")]


@pytest.mark.parametrize("task", take_few(GOALS, "answer", "classify"))
def test_every_printed_command_runs(task: str, capsys: Capture) -> None:
    assert main(["init", "--task", task]) == 0
    commands = list_commands(capsys.readouterr().out)
    assert [words[0] for words in commands[:3]] == ["preview", "train", "eval"]
    for words in commands:
        code = main(words + (FAST if words[0] == "train" else []))
        assert code == 0, f"lora-kit {shlex.join(words)}: {capsys.readouterr().err}"


def test_without_a_terminal_and_flags_the_error_names_the_flags(capsys: Capture, here: Path) -> None:
    assert main(["init"]) == 2
    error = capsys.readouterr().err
    assert all(flag in error for flag in ("--task", "--base", "--data", "--out"))
    assert not list(here.iterdir())


def test_on_a_terminal_it_asks_three_questions(capsys: Capture, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("tag\n\nexample\n"))
    assert main(["init"]) == 0
    asked = capsys.readouterr().out
    assert [asked.count(question) for question in ("What should it learn?", "Which base", "Where are the rows")] == [
        1,
        1,
        1,
    ]
    assert yaml.safe_load((here / "data" / "tag" / "recipe.yaml").read_text())["task"] == "tokens"


def test_what_is_given_is_not_asked(capsys: Capture, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert main(["init", "--task", "chat", "--base", "kit-base", "--data", "example", "--out", "mine"]) == 0
    assert "?" not in capsys.readouterr().out.partition("next:")[0]
    assert (here / "mine" / "recipe.yaml").is_file()


def test_rows_of_ones_own_need_no_task(capsys: Capture, here: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(30)]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["init", "--data", "mine.jsonl"]) == 0
    recipe = yaml.safe_load((here / "data" / "mine" / "recipe.yaml").read_text())
    assert (recipe["task"], recipe["out"]) == ("classify", "adapters/mine")
    assert main(["init", "--data", "mine.jsonl", "--task", "chat", "--out", "other"]) == 2
    assert "--task classify" in capsys.readouterr().err
    assert not (here / "other").exists()


@pytest.mark.parametrize("there", ["data/classify/notes.txt", "data/classify-example.jsonl"])
def test_nothing_that_is_there_is_replaced(there: str, capsys: Capture, here: Path) -> None:
    (here / there).parent.mkdir(parents=True)
    (here / there).write_text("mine")
    assert main(["init", "--task", "classify"]) == 3
    assert "exists already" in capsys.readouterr().err
    assert [path for path in here.rglob("*") if path.is_file()] == [here / there]
    assert (here / there).read_text() == "mine"


def test_where_it_fails_no_example_is_left_and_one_that_is_left_is_used(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any, **named: Any) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(start_project, "prepare", fail)
        assert main(["init", "--task", "classify", "--out", "new/mine"]) == 3
    assert not [path for path in here.rglob("*") if path.is_file()]
    assert not (here / "new").exists()
    (here / "new").mkdir()
    (here / "new" / "mine-example.jsonl").write_bytes(render_example("classify"))
    assert main(["init", "--task", "classify", "--out", "new/mine"]) == 0


def test_an_unknown_task_names_the_nearest(capsys: Capture) -> None:
    assert main(["init", "--task", "clasify"]) == 2
    assert "classify" in capsys.readouterr().err
