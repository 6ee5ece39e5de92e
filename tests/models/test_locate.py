"""Where a base is found: one answer for loading and for merging, and the errors of both."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from lora_kit.errors import BaseModelError
from lora_kit.models import locate
from lora_kit.models.locate import KIT_FOLDER, BaseSource, find_base, locate_base, translate_load_errors
from lora_kit.models.silence import silence_libraries

readers = pytest.mark.parametrize("read", [locate_base, find_base])


def make_base(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_the_base_in_the_package_needs_no_network() -> None:
    assert locate_base("kit-base") == BaseSource(str(KIT_FOLDER), KIT_FOLDER, local_files_only=True)
    assert find_base("kit-base") == KIT_FOLDER


def test_a_folder_is_where_it_is(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    assert locate_base(str(folder)).folder == find_base(folder) == folder


@readers
def test_what_is_not_a_base_is_refused_alike(read: Callable[[Any], object], tmp_path: Path) -> None:
    base, adapter, empty = make_base(tmp_path / "base"), tmp_path / "adapter", tmp_path / "empty"
    for folder in (adapter, empty):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for name, message in (
        (adapter, "holds an adapter, not a base"),
        (empty, r"no config\.json in this folder"),
        (base / "config.json", "is a file, not a base"),
        (tmp_path / "bse", "no such folder .*did you mean"),
        ("../a/b/c", "no such folder"),
        ("nobody/nothing", "not in the local cache, and HF_HUB_OFFLINE is set"),
    ):
        with pytest.raises(BaseModelError, match=message):
            read(name)


def test_a_path_is_never_a_hub_id() -> None:
    with pytest.raises(BaseModelError, match="no such folder"):
        find_base(Path("nobody/nothing"))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A hub with one model of pickled weights; returns the downloads."""
    downloads: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        downloads.append({"name": name, **options})
        return str(tmp_path / "snapshot")

    make_base(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="config.json")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return downloads


def test_a_hub_id_is_downloaded_with_pickles_only_where_there_is_nothing_else(
    online: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert find_base("some/model") == tmp_path / "snapshot"
    assert [call["allow_patterns"][-1] for call in online] == ["LICENSE*", "pytorch_model*"]
    (tmp_path / "snapshot" / "model.safetensors").write_bytes(b"")
    online.clear()
    find_base("some/model")
    assert [(call["name"], call["local_files_only"]) for call in online] == [("some/model", False)]


def test_locating_a_hub_id_downloads_nothing(online: list[dict[str, Any]]) -> None:
    assert locate_base("some/model") == BaseSource("some/model", None, local_files_only=False)
    assert not online


def test_a_download_that_fails_is_one_error(online: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BaseModelError, match=r"some/model: the download .* failed \(ConnectionError\)"):
        find_base("some/model")


def test_a_hub_that_does_not_answer_leaves_the_cache(
    online: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError

    caplog.set_level(logging.INFO, locate.__name__)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    find_base("some/model")
    assert all(call["local_files_only"] for call in online)
    assert "read from the local cache" in caplog.text


def test_errors_of_libraries_become_one_line_and_others_pass() -> None:
    with (
        pytest.raises(BaseModelError, match=r"^base: could not be read: Bad config: layers$"),
        translate_load_errors("base"),
    ):
        raise ValueError("Bad config:\n  layers\nmore")
    with pytest.raises(MemoryError), translate_load_errors("base"):
        raise MemoryError
    own = BaseModelError("own")
    with pytest.raises(BaseModelError) as caught, translate_load_errors("base"):
        raise own
    assert caught.value is own


def test_libraries_speak_again_after_the_block() -> None:
    from transformers.utils import logging as transformers_logging

    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with contextlib.suppress(KeyError), silence_libraries():
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    assert transformers_logging.get_verbosity() == before
    assert transformers_logging.is_progress_bar_enabled() == bars
