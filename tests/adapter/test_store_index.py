"""The index of a store: what was read once is not read again, and it is never the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.store import list_adapters
from lora_kit.adapter.store_index import INDEX
from lora_kit.cli.output import print_table
from lora_kit.errors import StorageError, VerificationError
from tests.support import tiny


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of two adapters whose files have not changed for a while."""
    bank = lk.attach(tiny.llama(), lk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name="one")
    bank.add("two", lk.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    for name in bank.names:
        bank.save(name, tmp_path / "store" / name, record={"metrics": {"steps": 3, "loss": 0.5}})
    settle(tmp_path / "store")
    return tmp_path / "store"


def settle(store: Path, *, seconds: int = 3600) -> None:
    for file in store.glob("*/*"):
        time = file.stat().st_mtime - seconds
        os.utime(file, (time, time))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters that were read."""
    names: list[str] = []
    load: Callable[..., Any] = Adapter.load

    def note(folder: Path, *args: Any, **options: Any) -> Adapter:
        names.append(Path(folder).name)
        return load(folder, *args, **options)

    monkeypatch.setattr(Adapter, "load", note)
    return names


def entries_of(store: Path) -> dict[str, Any]:
    return json.loads((store / INDEX).read_text())["adapters"]


def change_index(store: Path, name: str, **fields: Any) -> None:
    content = json.loads((store / INDEX).read_text())
    content["adapters"][name]["summary"] |= fields
    (store / INDEX).write_text(json.dumps(content))


def test_what_was_read_once_is_not_read_again(store: Path, loaded: list[str]) -> None:
    first = list_adapters(store)
    assert loaded == ["one", "two"]
    assert list_adapters(store) == first
    assert loaded == ["one", "two"]


def test_a_folder_that_changed_is_read_again(store: Path, loaded: list[str]) -> None:
    (before, _) = list_adapters(store)
    (store / "one" / "README.md").write_text("another card")
    (after, _) = list_adapters(store)
    assert loaded == ["one", "two", "one"]
    assert after.bytes != before.bytes
    (store / "two" / "notes.txt").write_text("a further file")
    list_adapters(store)
    assert loaded[3:] == ["one", "two"]  # files of this moment are not kept in the index


def test_what_came_and_what_went_is_seen(store: Path, loaded: list[str]) -> None:
    list_adapters(store)
    (store / "two").rename(store / "three")
    assert [summary.name for summary in list_adapters(store)] == ["one", "three"]
    assert loaded == ["one", "two", "three"]
    assert sorted(entries_of(store)) == ["one", "three"]


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"format": 1, "version": "0", "adapters": {}}', "nan"])
def test_an_index_that_is_gone_damaged_or_older_is_made_anew(
    store: Path, loaded: list[str], content: str | None
) -> None:
    first = list_adapters(store)
    good = (store / INDEX).read_bytes()
    (store / INDEX).unlink() if content is None else (store / INDEX).write_text(content)
    assert list_adapters(store) == first
    assert loaded == ["one", "two"] * 2
    assert (store / INDEX).read_bytes() == good


@pytest.mark.parametrize("fields", [{"rank": "2"}, {"targets": None}, {"more": 1}])
def test_an_entry_with_other_fields_is_not_believed(store: Path, loaded: list[str], fields: dict[str, Any]) -> None:
    first = list_adapters(store)
    change_index(store, "one", **fields)
    assert list_adapters(store) == first
    assert loaded == ["one", "two", "one"]


def test_an_index_that_lies_is_found_and_mended(store: Path) -> None:
    first = list_adapters(store)
    change_index(store, "two", digest="0" * 64)
    assert list_adapters(store)[1].digest == "0" * 64
    with pytest.raises(VerificationError, match="wrong about two"):
        list_adapters(store, verify=True)
    assert list_adapters(store) == list_adapters(store, verify=True) == first


def test_weights_that_changed_with_their_size_and_time_are_found(store: Path) -> None:
    list_adapters(store)
    weights = store / "one" / "adapter_model.safetensors"
    status, data = weights.stat(), bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not list_adapters(store)[0].problem
    with pytest.raises(VerificationError, match="wrong about one"):
        list_adapters(store, verify=True)
    assert list_adapters(store)[0].problem


def test_a_broken_adapter_is_read_every_time(store: Path, loaded: list[str]) -> None:
    weights = store / "one" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    settle(store)
    assert all(list_adapters(store)[0].problem for _ in range(2))
    assert loaded == ["one", "two", "one"]


def test_a_store_that_cannot_be_written_has_no_index(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("no permission")

    monkeypatch.setattr("lora_kit.adapter.store_index.write_file", refuse)
    assert len(list_adapters(store)) == 2
    assert not (store / INDEX).exists()


def test_an_indexed_store_is_listed_without_torch(store: Path) -> None:
    list_adapters(store)
    code = "import sys; from lora_kit.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "list", str(store)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"one", "two"} <= {line.split()[0] for line in done.stdout.splitlines() if line}


def test_a_long_table_is_laid_out_as_a_short_one(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "", "x"), ("漢字", "b", ""), ("c\x1b", "longer", "y")]
    print_table(("one", "two", "three"), rows)
    short = capsys.readouterr().out
    print_table(("one", "two", "three"), rows * 200)
    long = capsys.readouterr().out
    assert long.splitlines()[:4] == short.splitlines()
    assert len(long.splitlines()) == 601
