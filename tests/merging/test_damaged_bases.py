"""Bases that are damaged or mean harm: refused with the file's name, in no time, and nothing is built of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_kit as lk
from lora_kit.errors import BaseModelError, ConfigError, StorageError
from lora_kit.merging.checkpoint.shards import read_shards
from lora_kit.models.locate import find_base
from tests.support import texts, tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny base in several shards."""
    tiny.llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    texts.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def changed(base: Path, **fields: Any) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most 4,096"),
    "a billion layers of a part": ({"text_config": {"n_layer": 10**9}}, "n_layer is 1000000000"),
    "infinitely many layers": ({"encoder_layers": float("inf")}, "encoder_layers is inf"),
    "a billion labels": ({"num_labels": 10**9}, "num_labels is 1000000000"),
    "architectures that are a number": ({"architectures": 3}, "architectures is 3; a list of names"),
    "architectures that are numbers": ({"architectures": [3]}, "a list of names"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_nothing_can_be_built_of_is_refused_at_once(base: Path, name: str) -> None:
    fields, told = CONFIGS[name]
    changed(base, **fields)
    for read in (lk.load_base, find_base):
        with pytest.raises(BaseModelError, match=told):
            read(base)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "config.json: not JSON"),
        (b"[]", "config.json: a JSON object was expected, found list"),
        (b"[" * 100_000, "config.json: not JSON"),
        ('{"é'.encode("latin-1"), "config.json: not UTF-8 at line 1 column 3"),
        (b" " * 17 * 2**20, "at most 16,777,216 are expected"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_config_that_is_none_is_refused_with_its_name(base: Path, text: bytes, told: str) -> None:
    (base / "config.json").write_bytes(text)
    for read in (lk.load_base, find_base):
        with pytest.raises(BaseModelError, match=told):
            read(base)


def test_a_config_may_be_a_link_and_hold_infinity(base: Path, tmp_path: Path) -> None:
    (base / "config.json").rename(tmp_path / "elsewhere.json")
    (base / "config.json").symlink_to(tmp_path / "elsewhere.json")
    changed(base, time_step_limit=[0.0, float("inf")])
    assert find_base(base) == base
    assert lk.load_base(base).model.config.num_hidden_layers == 2


def test_what_transformers_announces_is_followed_by_what_it_says(base: Path) -> None:
    changed(base, num_attention_heads=5)
    with pytest.raises(BaseModelError, match="not a multiple of the number of attention heads") as caught:
        lk.load_base(base)
    assert "\n" not in str(caught.value)


def test_a_shard_that_the_index_does_not_know_is_refused(base: Path) -> None:
    assert len(read_shards(base)) > 1
    # What other programs read is none of ours.
    save_file({"more": torch.ones(2)}, base / "consolidated.safetensors")
    (base / "pytorch_model-00001-of-00001.bin").write_bytes(b"the same in an older form")
    assert len(read_shards(base)) > 1
    save_file({"more": torch.ones(2)}, base / "model-00099-of-00099.safetensors")
    with pytest.raises(BaseModelError, match=r"does not know the shard model-00099-of-00099\.safetensors"):
        read_shards(base)


@pytest.mark.parametrize(
    "adapter", [[], ["sql"], [("sql",)], [("sql", "x")], [("sql", float("nan"))], [(3, 1.0)], 3, None, {"sql": 1.0}]
)
def test_what_is_no_adapter_with_a_weight_is_said_before_any_work(tmp_path: Path, adapter: Any) -> None:
    with pytest.raises(ConfigError, match="an adapter, or a list of"):
        lk.merge("kit-base", adapter, tmp_path / "merged")


def test_an_output_that_is_no_path_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is not a path"):
        lk.merge(base, "sql", f"{tmp_path}/a\0b")
