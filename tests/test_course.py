"""The course: its script runs, and every command and every row of its page runs in the folder that the script makes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lora_kit.cli.main import main
from tests.support import examples, pages
from tests.support.long_runs import take_few
from tests.support.pages import ROOT

PAGE = ROOT / "docs" / "course.md"
TINY = "tiny/gpt2"
SHORT = {"train": ["--train.max_steps", "2"], "sweep": ["--train.max_steps", "2"], "prepare": ["--base", TINY]}
"""What a command gets in addition, so that it takes a second: few steps, and a base of a few thousand weights."""
FAMILIES = 13

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def commands() -> list[list[str]]:
    """The commands of the page's steps, in order."""
    found = [words for block in pages.blocks(PAGE, "sh") for words in pages.commands(block)]
    return [words[1:] for words in found if words[0] == "lora-kit"]


def rows() -> list[list[str]]:
    """The commands of the table of models."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if "--base tiny/" in line]
    return [shlex.split(re.findall(r"`lora-kit ([^`]+)`", line)[0]) for line in lines]


def run(words: list[str], *, short: bool, capsys: pytest.CaptureFixture[str]) -> str:
    code = main([*words, *(SHORT.get(words[0], []) if short else [])])
    out, err = capsys.readouterr()
    assert code == 0, f"{shlex.join(words)}\n{err}"
    return out


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        examples.load("course").main(folder, "files")
    return folder


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    course: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(course)
    for words in commands():
        if words[0] != "sweep":  # twelve trainings; the script's are run below
            run(words, short=True, capsys=capsys)


@pytest.mark.parametrize(
    "words", take_few(rows(), *rows()[::3]), ids=lambda words: Path(words[words.index("--base") + 1]).name
)
def test_a_row_of_the_table_of_models_runs(
    words: list[str], course: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(course)
    assert "trained" in run(words, short=True, capsys=capsys)


def test_the_table_has_a_row_for_each_tiny_model(course: Path) -> None:
    assert {Path(words[words.index("--base") + 1]).name for words in rows()} == {
        path.name for path in (course / "tiny").iterdir()
    }
    assert len(rows()) == FAMILIES


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    script = examples.load("course")
    monkeypatch.setattr(script, "FAMILIES", ["gpt2"])
    monkeypatch.setattr(script, "BASE", TINY)
    script.main(tmp_path, **{"train.max_steps": 2})
    out = capsys.readouterr().out
    assert all(f"Step {number}:" in out for number in range(2, 10))


@pytest.mark.slow
@pytest.mark.report
def test_the_script_and_the_page_run_as_they_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    examples.load("course").main(tmp_path / "script")
    out = capsys.readouterr().out
    assert float(re.findall(r"test: {'accuracy': ([\d.]+)", out)[0]) >= 0.9
    monkeypatch.chdir(tmp_path)
    examples.load("course").main(tmp_path / "page", "files")
    for words in [*commands(), *rows()]:
        run(words, short=False, capsys=capsys)
