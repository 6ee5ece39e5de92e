"""What clients call adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, UnknownAdapterError
from lora_kit.serving.adapter_labels import AdapterLabels, set_aliases
from tests.support import random_adapters


@pytest.fixture(scope="module")
def made() -> Iterator[list[lk.Adapter]]:
    base = lk.load_base("kit-base", dtype="fp32")
    return [random_adapters.made(base, seed=seed, target_modules=["q_proj"], r=2) for seed in (1, 2)]


@pytest.fixture
def store(made: list[lk.Adapter], tmp_path: Path) -> Path:
    for name, adapter in zip(("sql", "sum"), made, strict=True):
        adapter.save(tmp_path / "store" / name)
    return tmp_path / "store"


def open_labels(store: Path) -> AdapterLabels:
    return AdapterLabels(store, base_name="kit-base", state_file=store.parent / "state.json")


def test_every_adapter_of_the_store_has_its_name(store: Path, made: list[lk.Adapter]) -> None:
    labels = open_labels(store)
    assert labels.names() == ("sql", "sum")
    assert labels.resolve("sql").digest == made[0].digest
    assert labels.resolve(f"sum@{made[1].digest[:12]}").digest == made[1].digest


def test_an_adapter_that_comes_later_is_found_and_a_changed_one_read_again(store: Path, made: list[lk.Adapter]) -> None:
    labels = open_labels(store)
    first = labels.resolve("sql")
    assert labels.resolve("sql") is first
    made[1].save(store / "sql", replace=True)
    made[0].save(store / "late")
    assert labels.resolve("sql").digest == made[1].digest
    assert labels.peek("late") is None
    assert labels.resolve("late").digest == made[0].digest
    with pytest.raises(UnknownAdapterError):
        labels.resolve(f"sql@{made[0].digest[:12]}")


@pytest.mark.parametrize("name", ["nothing", "../sql", "store/sql", "", "sql/", ".", "sql@", "/etc"])
def test_only_names_of_the_store_are_found(store: Path, name: str) -> None:
    labels = open_labels(store)
    if name == "sql@":
        assert labels.resolve(name).digest  # an empty digest says nothing
        return
    with pytest.raises(UnknownAdapterError):
        labels.resolve(name)


def test_links_out_of_the_store_are_not_followed(store: Path, tmp_path: Path) -> None:
    shutil.move(store / "sum", tmp_path / "elsewhere")
    (store / "sum").symlink_to(tmp_path / "elsewhere")
    labels = open_labels(store)
    assert labels.names() == ("sql",)
    with pytest.raises(UnknownAdapterError):
        labels.resolve("sum")


def test_labels_aliases_and_pins_are_there_again(store: Path, made: list[lk.Adapter]) -> None:
    labels = open_labels(store)
    labels.load("prod", "sql")
    labels.alias("chat", "prod")
    labels.pin("prod", pinned=True)
    again = open_labels(store)
    assert again.names() == ("sql", "sum", "prod", "chat")
    assert again.resolve("chat").digest == made[0].digest
    assert again.state.pinned == {"prod"}
    again.load("prod", "sum")
    assert open_labels(store).resolve("chat").digest == made[1].digest
    again.unload("prod")
    assert open_labels(store).names() == ("sql", "sum")


def test_what_would_hide_something_is_refused(store: Path) -> None:
    labels = open_labels(store)
    labels.alias("chat", "sql")
    for change in (
        lambda: labels.load("kit-base", "sql"),
        lambda: labels.load("chat", "sql"),
        lambda: labels.load("a/b", "sql"),
        lambda: labels.load("x", "nothing"),
        lambda: labels.alias("sum", "sql"),
        lambda: labels.alias("second", "chat"),
        lambda: labels.alias("other", "nothing"),
        lambda: labels.unload("sql"),
        lambda: labels.remove_alias("sql"),
    ):
        before = labels.state
        with pytest.raises(LoraKitError):
            change()
        assert labels.state == before


def test_a_label_never_hides_another_adapter_of_the_store(store: Path, made: list[lk.Adapter]) -> None:
    labels = open_labels(store)
    with pytest.raises(ConfigError, match="another adapter of the store"):
        labels.load("sql", "sum")
    labels.load("sql", "sql")  # which is what it is called anyway
    assert labels.resolve("sql").digest == made[0].digest


def test_a_state_that_cannot_be_written_changes_nothing(store: Path) -> None:
    labels = AdapterLabels(store, base_name="kit-base", state_file=store.parent / "no" / "folder" / "state.json")
    (store.parent / "no").write_text("a file", encoding="utf-8")
    with pytest.raises(LoraKitError):
        labels.alias("chat", "sql")
    assert labels.names() == ("sql", "sum")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "loaded": [], "aliases": {}, "pinned": []}']
)
def test_a_state_of_another_kind_is_an_error_and_is_kept(store: Path, text: str) -> None:
    file = store.parent / "state.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="state"):
        open_labels(store)
    assert file.read_text(encoding="utf-8") == text


def test_a_damaged_adapter_is_an_error_of_its_own(store: Path) -> None:
    config = store / "sum" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), "r": 3}), encoding="utf-8")
    labels = open_labels(store)
    with pytest.raises(AdapterError):
        labels.resolve("sum")
    assert labels.resolve("sql").digest


def test_aliases_of_the_start_are_all_there_or_none(store: Path) -> None:
    labels = open_labels(store)
    with pytest.raises(UnknownAdapterError):
        set_aliases({"chat": "sql", "other": "nothing"}, labels)
    assert labels.state.aliases == {}
    set_aliases({"chat": "sql"}, labels)
    assert labels.state.aliases == {"chat": "sql"}


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(
    store: Path, made: list[lk.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, load, reads = open_labels(store), lk.Adapter.load, list[Path]()

    def replace_while_reading(folder: Path) -> lk.Adapter:
        reads.append(folder)
        if len(reads) == 1:
            made[1].save(store / "sql", replace=True)
            raise AdapterError("torn")
        return load(folder)

    monkeypatch.setattr(lk.Adapter, "load", replace_while_reading)
    assert labels.resolve("sql").digest == made[1].digest
    assert len(reads) == 2


def test_a_folder_that_vanishes_or_is_torn_is_an_error_of_its_own_label(store: Path, made: list[lk.Adapter]) -> None:
    labels = open_labels(store)
    labels.resolve("sql")
    weights = store / "sql" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError):
        labels.resolve("sql")
    assert labels.peek("sql") is None
    shutil.rmtree(store / "sql")
    with pytest.raises(UnknownAdapterError):
        labels.resolve("sql")
    assert labels.resolve("sum").digest == made[1].digest
    shutil.rmtree(store)
    assert labels.names() == ()
