"""Paths in files that travel: no home folder, no data outside the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.io.portable_paths import make_folder_portable, make_path_portable


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "ada" / "project"
    project.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    monkeypatch.chdir(project)
    return tmp_path / "ada"


def test_a_path_in_the_project_is_relative_and_one_outside_is_its_name(home: Path) -> None:
    inside, outside = home / "project" / "data" / "a.jsonl", home / "clients" / "acme.jsonl"
    assert make_path_portable(str(inside)) == "data/a.jsonl"
    for path in (
        str(outside),
        "~/clients/acme.jsonl",
        "../clients/acme.jsonl",
        "data/../../acme.jsonl",
        "/srv/acme.jsonl",
    ):
        assert make_path_portable(path) == "acme.jsonl"
    for path in ("data/a.jsonl", "./a.jsonl", "organization/name", "..a.jsonl"):
        assert make_path_portable(path) == path


def test_a_base_is_found_again_and_names_no_home(home: Path) -> None:
    assert make_folder_portable(str(home / "project" / "base")) == "base"
    assert make_folder_portable(str(home / "models" / "llama")) == "~/models/llama"
    assert make_folder_portable("../models/llama") == "~/models/llama"
    assert make_folder_portable("/home/grace/models/llama") == "llama"
    assert make_folder_portable("/models/llama") == "/models/llama"
    assert make_folder_portable("kit-base") == "kit-base"


def test_a_process_at_the_root_hides_paths_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert make_path_portable(str(home / "data" / "a.jsonl")) == "a.jsonl"
    assert make_folder_portable(str(home / "models" / "llama")) == "~/models/llama"
