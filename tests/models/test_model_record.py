"""How a whole model is asked, read from its folder or from a repository of the hub; kept where adapters are changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_kit as lk
from lora_kit.adapter.use_record import MODEL_RECORD
from lora_kit.errors import BaseModelError
from lora_kit.merging.merge import merge
from lora_kit.models.locate import BaseSource
from lora_kit.models.model_record import read_folder_record, read_model_record
from tests.support import folders, tiny
from tests.support.hub_cache import add_repository, use_cache
from tests.support.merging import adapter_folder, base_folder

THRESHOLDS = {"a": 0.25, "b": 0.5, "c": 0.75}


def hub(revision: str | None = None, subfolder: str = "") -> BaseSource:
    return BaseSource("owner/model", None, True, revision, subfolder)


@pytest.mark.parametrize(("revision", "subfolder"), [(None, ""), ("v2", ""), (None, "merged"), ("v2", "merged")])
def test_the_record_of_a_repository_is_that_of_its_revision_and_folder(
    tmp_path: Path, revision: str | None, subfolder: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / MODEL_RECORD).write_text('{"problem": "other"}', "utf-8")
    for other in (r for r in ("main", "v2") if r != (revision or "main")):
        add_repository(tmp_path / "cache", "owner/model", source, revision=other, subfolder=subfolder)
    (source / MODEL_RECORD).write_text(json.dumps({"thresholds": THRESHOLDS}), "utf-8")
    add_repository(tmp_path / "cache", "owner/model", source, revision=revision or "main", subfolder=subfolder)
    with use_cache(tmp_path):
        assert read_model_record(hub(revision, subfolder)) == {"thresholds": THRESHOLDS}


def test_a_repository_without_a_record_has_an_empty_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}", "utf-8")
    add_repository(tmp_path / "cache", "owner/model", source)
    with use_cache(tmp_path):
        assert read_model_record(hub()) == {}


def test_a_damaged_record_of_a_repository_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / MODEL_RECORD).write_text('{"thresholds": ', "utf-8")
    add_repository(tmp_path / "cache", "owner/model", source)
    with use_cache(tmp_path), pytest.raises(BaseModelError, match="without that file the model is asked as any other"):
        read_model_record(hub())


def with_thresholds(adapter: lk.Adapter) -> lk.Adapter:
    record: dict[str, Any] = {**adapter.record, "problem": "multi-label", "thresholds": THRESHOLDS}
    return lk.Adapter(adapter.config, adapter.tensors, record=record)


def test_an_adapter_of_another_rank_keeps_its_thresholds() -> None:
    assert lk.resize(with_thresholds(folders.adapter()), rank=2).record["thresholds"] == THRESHOLDS


def test_a_merged_model_of_several_labels_keeps_their_thresholds(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", tiny.llama())
    torch.manual_seed(0)
    adapter = lk.Adapter.load(
        adapter_folder(base, tmp_path / "labels", task="classify", task_type="SEQ_CLS", modules_to_save=["score"])
    )
    labeled = lk.Adapter(adapter.config, adapter.tensors, record={**adapter.record, "labels": [*THRESHOLDS]})
    merge(base, with_thresholds(labeled), tmp_path / "merged")
    assert read_folder_record(tmp_path / "merged")["thresholds"] == THRESHOLDS
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert config["problem_type"] == "multi_label_classification"
