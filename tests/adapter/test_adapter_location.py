"""What an adapter may be called: a path, a name in the store, an id of the hub; and what each finds first."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import lora_kit as lk
from lora_kit.adapter.adapter_files import CONFIG, OLD_WEIGHTS, WEIGHTS
from lora_kit.adapter.adapter_location import AdapterLocation, label_adapter_folder, resolve_adapter
from lora_kit.adapter.store import find_adapter
from lora_kit.algebra.sources import SourceAdapter
from lora_kit.errors import AdapterError, ConfigError, RecipeError, UnknownAdapterError
from lora_kit.exporters.export import check
from lora_kit.io.hub import HubId, split_revision
from tests.support import folders, hub_cache, tiny


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub that is read without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a store of one adapter, and a folder of several adapters."""
    work = tmp_path / "work"
    folders.adapter(seed=1).save(work / "adapters" / "sql")
    for step in (100, 200):
        folders.adapter(seed=step).save(work / "run" / f"checkpoint-{step}")
    monkeypatch.chdir(work)
    return work


def test_names_and_paths_mean_the_same_everywhere(here: Path) -> None:
    digest, bank = folders.adapter(seed=1).digest, lk.attach(tiny.llama())
    assert lk.Adapter.load("sql").digest == lk.Adapter.load("adapters/sql").digest == digest
    assert bank.load("by name", "sql").digest == digest
    bank.offer("offered", "sql")
    assert SourceAdapter.of("sql").adapter.digest == digest
    assert check("sql", "peft").refused == ()
    assert lk.Adapter.load("run/checkpoint-200").digest == folders.adapter(seed=200).digest
    assert resolve_adapter("checkpoint-100", store="run") == AdapterLocation(Path("run/checkpoint-100"), "store")


def test_a_folder_of_several_adapters_in_the_store_is_named_with_a_slash(here: Path) -> None:
    shutil.move(here / "run", here / "adapters" / "run")
    assert lk.Adapter.load("run/checkpoint-100").digest == folders.adapter(seed=100).digest
    with pytest.raises(UnknownAdapterError, match="did you mean 'run/checkpoint-"):
        find_adapter("run/checkpoint-300")


def test_an_error_names_the_folders_below_that_hold_an_adapter(here: Path) -> None:
    for name in ("run", Path("run")):
        with pytest.raises(ConfigError, match=r"run/checkpoint-100, run/checkpoint-200"):
            lk.Adapter.load(name)
    (here / "runs" / "one").mkdir(parents=True)
    shutil.move(here / "run", here / "runs" / "one" / "run")
    with pytest.raises(ConfigError, match=r"these hold an adapter: runs/one/run/checkpoint-100"):
        lk.Adapter.load(Path("runs"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sqll", "did you mean 'sql'"),
        ("zzzzzz", "adapters holds sql"),
        ("run/checkpoint-300", "did you mean 'run/checkpoint-"),
        ("adapters/nothing", "did you mean 'adapters/sql'"),
        ("../adapters/sql/none", "no adapter is called"),
        ("", "no adapter is called"),
        ("nul\0", "no adapter is called"),
        ("x" * 300, "no adapter is called"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(here: Path, name: str, message: str) -> None:
    with pytest.raises(UnknownAdapterError, match=message):
        find_adapter(name)
    with pytest.raises(AdapterError, match=f"is not a folder: .*{message}"):
        lk.Adapter.load(name)


def test_a_path_wins_over_a_name_and_says_so(here: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (here / "sql").mkdir()
    assert resolve_adapter("sql") == AdapterLocation(Path("adapters/sql"), "store")  # the folder here has no adapter
    shutil.copytree(folders.adapter(seed=9).save(here / "other"), here / "sql", dirs_exist_ok=True)
    caplog.set_level(logging.WARNING)
    assert lk.Adapter.load("sql").digest == folders.adapter(seed=9).digest
    assert "the folder is taken" in caplog.text
    hub_cache.add_repository(cache, "run/checkpoint-100", here / "adapters" / "sql")
    assert resolve_adapter("run/checkpoint-100").origin == "path"


@pytest.mark.parametrize("value", [None, 5, ["sql"]])
def test_what_is_no_name_is_an_error(value: Any) -> None:
    bank = lk.attach(tiny.llama())
    for use in (lk.Adapter.load, lambda given: bank.load("x", given), lambda given: bank.offer("x", given)):
        with pytest.raises(ConfigError, match="was given as an adapter"):
            use(value)
    if value != ["sql"]:
        with pytest.raises(RecipeError, match="was given as a recipe"):
            lk.train(value)


# The hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("gpt2", HubId("gpt2")),
        ("org/name@v1.0", HubId("org/name", "", "v1.0")),
        ("org/name/sub/er@refs/pr/1", HubId("org/name", "sub/er", "refs/pr/1")),
        ("/org/name", None),
        ("org/../name", None),
        ("org/name@", None),
        ("a b/c", None),
    ],
)
def test_the_form_of_an_id(text: str, expected: HubId | None) -> None:
    assert HubId.parse(text) == expected


def test_adapters_come_from_the_cache_by_id_revision_and_subfolder(tmp_path: Path, cache: Path) -> None:
    one, two, below = (folders.adapter(seed=seed) for seed in (1, 2, 3))
    hub_cache.add_repository(cache, "org/sql", one.save(tmp_path / "one"))
    commit = hub_cache.add_repository(cache, "org/sql", two.save(tmp_path / "two"), revision="v2")
    hub_cache.add_repository(cache, "org/many", below.save(tmp_path / "three"), subfolder="checkpoint-3")
    assert lk.Adapter.load("org/sql") == one
    assert lk.Adapter.load("org/sql@v2") == lk.Adapter.load(f"org/sql@{commit}") == two
    assert lk.Adapter.load("org/many/checkpoint-3") == below
    found = resolve_adapter("org/sql@v2")
    assert (found.origin, label_adapter_folder(found.folder)) == ("hub", "sql")
    with pytest.raises(AdapterError, match=r"no adapter_config.json .*org/many/checkpoint-3"):
        lk.Adapter.load("org/many")
    with pytest.raises(AdapterError, match=r"the local cache has main, v2 of org/sql, .*\(org/sql@main\)"):
        lk.Adapter.load("org/sql@v3")
    with pytest.raises(AdapterError, match=r"a subfolder stands before the revision: org/sql/checkpoint-3@v2"):
        lk.Adapter.load("org/sql@v2/checkpoint-3")
    with pytest.raises(AdapterError, match=r"these hold one: org/sql@v2"):
        lk.Adapter.load("org/sql/nothing@v2")
    with pytest.raises(UnknownAdapterError, match="not in the local cache"):
        find_adapter("org/nothing")


def test_a_path_is_never_an_id(tmp_path: Path, cache: Path) -> None:
    hub_cache.add_repository(cache, "org/sql", folders.adapter().save(tmp_path / "one"))
    with pytest.raises(AdapterError, match="is not a folder"):
        lk.Adapter.load(Path("org/sql"))
    with pytest.raises(UnknownAdapterError):
        resolve_adapter(Path("org/sql"))


@pytest.mark.parametrize("weights", [WEIGHTS, OLD_WEIGHTS])
def test_only_the_files_of_an_adapter_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    patterns: list[str] = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert (name, options) == ("org/many", {"revision": "v1", "local_files_only": False})
        patterns.extend(allow_patterns)
        return str(tmp_path)

    files = [SimpleNamespace(rfilename=f"sql/{name}") for name in (CONFIG, weights, "optimizer.pt")]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_adapter("org/many/sql@v1").folder == tmp_path / "sql"
    assert (f"sql/{OLD_WEIGHTS}" in patterns) == (weights == OLD_WEIGHTS)
    assert all(pattern.startswith("sql/") for pattern in patterns)


def test_the_revision_of_a_base_is_told_from_the_name_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base@v2").mkdir(parents=True)
    assert split_revision("org/name@v2") == ("org/name", "v2")
    assert split_revision("models/base@v2") == ("models/base@v2", None)
    assert split_revision("/abs/base@v2") == ("/abs/base@v2", None)
