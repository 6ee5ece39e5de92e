"""The scripts and the notebooks of examples/ run, each as a person would run it, with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import examples, pages
from tests.support.examples import EXAMPLES
from tests.support.long_runs import take_few
from tests.support.pages import ROOT

SCRIPTS: dict[str, dict[str, Any]] = {
    "adopt_peft_model": {"steps": 2},
    "combine_adapters": {},
    "merge_and_export": {},
    "plain_loop": {"steps": 2},
    "prefer_with_trl": {"steps": 1},
    "serve_and_ask": {},
    "swap_while_answering": {"tokens": 4},
    "train_chat_voice": {"train.max_steps": 1},
    "train_classifier": {"train.max_steps": 1},
    "train_many_at_once": {"train.max_steps": 1},
    "train_on_ray": {"train.max_steps": 1},
}
"""What each is called with here, so that it takes a second or two."""
MODULES = {"course", "tiny_models"}
"""Tested by test_course.py."""
EXTRAS = {"prefer_with_trl": ("trl",), "serve_and_ask": ("fastapi", "uvicorn"), "train_on_ray": ("ray",)}
STARTING = ("serve_and_ask", "train_on_ray")
"""Those that start processes of their own, which takes its time."""
MAX_LINES = 80
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("name", take_few(SCRIPTS, *(name for name in SCRIPTS if name not in STARTING)))
def test_a_script_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EXTRAS.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    examples.load(name).main(**SCRIPTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_it_stands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EXTRAS.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    examples.load(name).main()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_in_order(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / "adapters").mkdir()
    for folder in ("mood", "pirate", "scene"):
        (tmp_path / "adapters" / folder).symlink_to(ROOT / "adapters" / folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, code in enumerate(_cells(notebook, "code"), start=1):
        exec(compile(code, f"{notebook.name}, cell {number}", "exec"), names)


def _cells(notebook: Path, kind: str) -> list[str]:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs(notebook: Path) -> None:
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_every_example_is_tested_short_and_in_the_list() -> None:
    scripts = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(SCRIPTS) | MODULES
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in scripts.items() if name in SCRIPTS}
    assert max(lengths.values()) < MAX_LINES
    assert (len(SCRIPTS), len(NOTEBOOKS)) == (11, 3)
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    assert not [path.name for path in [*scripts.values(), *NOTEBOOKS] if path.name not in page]
    assert pages.blocks(ROOT / "docs" / "examples.md", "sh")
