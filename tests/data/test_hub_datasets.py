"""Data sets of the hub as rows; the hub is a folder here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import huggingface_hub
import pytest

from lora_kit.cli.main import main
from lora_kit.data.hub_datasets import is_dataset
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.row_stream import RowStream
from lora_kit.data.rows import collect_label_names, read_rows
from lora_kit.errors import DataError
from lora_kit.training.train import train
from tests.support import texts
from tests.support.training import base_of, recipe_of

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train.parquet}
  - {split: validation, path: data/validation.parquet}
- config_name: words
  data_files:
  - {split: test, path: words/test.parquet}
- config_name: labels
  data_files:
  - {split: train, path: labels/train.parquet}
---
"""
PAIRS = [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(5)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """What is asked of `owner/name`, which has three configs; everything else goes to the hub itself."""
    folder, asked, load = tmp_path / "hub", [], datasets.load_dataset
    text, names = datasets.Value("string"), datasets.ClassLabel(names=["no", "yes"])
    tables = {
        "data/train": datasets.Dataset.from_list(PAIRS[:3]),
        "data/validation": datasets.Dataset.from_list(PAIRS[3:]),
        "words/test": datasets.Dataset.from_dict(
            {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 1], [1]]},
            features=datasets.Features({"tokens": datasets.List(text), "ner_tags": datasets.List(names)}),
        ),
        "labels/train": datasets.Dataset.from_dict(
            {"text": ["a", "b"], "label": [1, 0]},
            features=datasets.Features({"text": text, "label": names}),
        ),
    }
    datasets.disable_progress_bars()
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(folder / f"{name}.parquet"))
    (folder / "README.md").write_text(CARD)

    def asked_of(repository: str, config: str | None = None, *, split: str) -> Any:
        asked.append((repository, config, split))
        place = str(folder) if repository == "owner/name" else repository
        return load(place, config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", asked_of)
    monkeypatch.chdir(tmp_path)
    return asked


Asked = list[tuple[str, str | None, str]]


def test_names_of_data_sets_and_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("a/b", "a/b:test", "a/b/c", "a/b/c:train", "a/b:train[:10%]", "nyu-mll/glue/sst2:test", "a/b.c"):
        assert is_dataset(Path(name)), name
    for name in (
        "a",
        "a.jsonl",
        "a/b.jsonl",
        "a/b.csv:test",
        "./a.jsonl",
        "/a/b",
        "../a/b",
        "here/b",
        "a/b/c/d",
        "a/b:",
    ):
        assert not is_dataset(Path(name)), name


def test_splits_and_configs(hub: Asked) -> None:
    train_rows = read_rows("owner/name")
    assert (train_rows.format, train_rows.lines) == ("completion", (1, 2, 3))
    assert train_rows.values == read_rows(texts.write(Path("rows.jsonl"), PAIRS[:3])).values
    assert len(read_rows("owner/name:validation")) == len(read_rows("owner/name", split="validation")) == 2
    assert len(read_rows("owner/name:train", split="validation")) == 3
    assert len(read_rows("owner/name:train[:1]")) == 1
    assert hub == [
        ("owner/name", None, "train"),
        ("owner/name", None, "validation"),
        ("owner/name", None, "validation"),
        ("owner/name", None, "train"),
        ("owner/name", None, "train[:1]"),
    ]


def test_classes_have_their_names(hub: Asked) -> None:
    words = read_rows("owner/name/words:test")
    assert words.values == ((("a", "b"), ("no", "yes")), (("c",), ("yes",)))
    assert collect_label_names(read_rows("owner/name/labels")) == collect_label_names(words) == ("no", "yes")
    assert read_rows("hub/words/test.parquet").values == words.values
    assert hub == [("owner/name", "words", "test"), ("owner/name", "labels", "train")]


def test_a_file_here_wins(hub: Asked) -> None:
    Path("owner").mkdir()
    texts.write(Path("owner/name.jsonl"), PAIRS)
    assert len(read_rows("owner/name.jsonl")) == 5
    with pytest.raises(DataError, match=r"owner/name: no such file \(did you mean 'owner/name.jsonl'"):
        read_rows("owner/name")
    assert hub == []


def test_what_was_tried_is_said(hub: Asked) -> None:
    with pytest.raises(DataError, match=r"^owner/nme:test: no such file here.*owner/nme, split test.*Offline"):
        read_rows("owner/nme:test")
    with pytest.raises(DataError, match=r"config words, split tset.*Unknown split \"tset\".*\['test'\]"):
        read_rows("owner/name/words:tset")
    with pytest.raises(DataError, match=r"'wrds' not found. Available: \['default', 'words', 'labels'\]"):
        read_rows("owner/name/wrds")


def test_a_hub_that_does_not_answer_is_asked_once(hub: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def unreachable(self: Any, repository: str, *, timeout: float) -> None:
        asked.append((repository, timeout))
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match=r"owner/name.*no route.*HF_HUB_OFFLINE=1"):
        read_rows("owner/name")
    assert (asked, hub) == ([("owner/name", 10)], [])


def test_a_recipe_validates_on_the_split_of_that_name(hub: Asked, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path) | {"data": {"train": "owner/name", "validation": "owner/name"}}
    report = train(recipe, base=base_of())
    assert report.after is not None
    assert report.after.samples == 2
    assert hub == [("owner/name", None, "train"), ("owner/name", None, "validation")]


def test_prepare_makes_files_of_a_data_set(hub: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = prepare("owner/name", tmp_path / "a", validation="owner/name")
    assert read_rows(tmp_path / "a" / "validation.jsonl").values == read_rows("owner/name:validation").values
    sums = [source["sha256"] for source in json.loads((tmp_path / "a" / "manifest.json").read_text())["sources"]]
    assert len(set(sums)) == 2
    assert main(["prepare", "owner/name", "--out", "b", "--share", "0"]) == 0
    assert "prompt and completion" in capsys.readouterr().out
    assert json.loads(Path("b/manifest.json").read_text())["sources"][0]["sha256"] == sums[0]
    assert found.parts[0].to_json()["path"] == "owner/name"


def test_a_data_set_is_streamed_from_the_cache(hub: list[tuple[str, str | None, str]]) -> None:
    stream, whole = RowStream.open("owner/name/labels", split="train"), read_rows("owner/name/labels", split="train")
    rows = [value for chunk in stream.chunks() for value in chunk.values]
    assert (rows, stream.count) == (list(whole.values), 2)
    assert rows[0][1] == "yes"
