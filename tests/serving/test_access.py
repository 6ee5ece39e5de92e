"""Who may do what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_kit.errors import ConfigError
from lora_kit.serving.access import AccessKeys, check_host, hash_key, read_keys


def write_keys(folder: Path, *keys: dict[str, object]) -> Path:
    file = folder / "keys.json"
    file.write_text(json.dumps({"keys": keys}), encoding="utf-8")
    return file


def test_a_key_opens_what_it_is_for(tmp_path: Path) -> None:
    mine, boss = "lk-mine", "lk-boss"
    keys = read_keys(
        write_keys(
            tmp_path,
            {"name": "me", "sha256": hash_key(mine), "adapters": ["sql"]},
            {"name": "boss", "sha256": hash_key(boss), "admin": True},
        )
    )
    access = keys.find(mine)
    assert access is not None
    assert (access.name, access.may_ask("sql"), access.may_ask("other"), access.is_admin) == ("me", True, False, False)
    everything = keys.find(boss)
    assert everything is not None
    assert everything.is_admin
    assert everything.may_ask("anything")
    assert keys.find("wrong") is None
    assert keys.find(None) is None
    assert mine not in (tmp_path / "keys.json").read_text(encoding="utf-8")


def test_without_keys_everybody_on_this_machine_may_do_everything() -> None:
    access = AccessKeys({}).find(None)
    assert access is not None
    assert access.is_admin


def test_other_machines_need_keys(tmp_path: Path) -> None:
    check_host("127.0.0.1", AccessKeys({}))
    with pytest.raises(ConfigError, match="there are no keys"):
        check_host("0.0.0.0", AccessKeys({}))
    check_host("0.0.0.0", read_keys(write_keys(tmp_path, {"name": "me", "sha256": hash_key("x")})))


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "me", "sha256": "short"},
        {"sha256": "0" * 64},
        {"name": "me", "sha256": "0" * 64, "adapters": "sql"},
        {"name": "me", "sha256": "0" * 64, "role": "admin"},
        "key",
    ],
)
def test_a_wrong_file_of_keys_is_an_error_and_never_no_keys(entry: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key 1"):
        read_keys(write_keys(tmp_path, entry))  # type: ignore[arg-type]
    (tmp_path / "empty.json").write_text('{"keys": []}', encoding="utf-8")
    with pytest.raises(ConfigError):
        read_keys(tmp_path / "empty.json")
