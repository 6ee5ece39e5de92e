"""Bases that are damaged or mean harm: refused with the file's name, in no time, and nothing is built of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import BaseModelError, ConfigError, MergeError, StorageError
from lora_kit.merging.checkpoint.shards import read_shards
from lora_kit.models.locate import find_base
from tests.support import merging, texts, tiny


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


# What is seen and is no error


def nan_base(tmp_path: Path, value: float, *, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A base with one such value in a layer that its adapter does not change."""
    model = tiny.llama(dtype=dtype)
    base = merging.base_folder(tmp_path / "base", model)
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["q_proj"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(base)
    return base, adapter


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_tensor_that_nobody_changes_and_is_not_finite_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float, dtype: torch.dtype
) -> None:
    base, adapter = nan_base(tmp_path, value, dtype=dtype)
    allow = {"other-base", "lost-delta"}
    for number, to in enumerate((None, "bfloat16")):
        caplog.clear()
        lk.merge(base, adapter, tmp_path / f"merged-{number}", allow=allow, dtype=to)
        assert [record.getMessage() for record in caplog.records if "NaN or infinity" in record.getMessage()] == [
            "the base has NaN or infinity, which the result has too, in model.layers.1.mlp.up_proj.weight: "
            "is its file damaged?"
        ]


def test_a_finite_base_is_merged_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, adapter = nan_base(tmp_path, 1.0)
    lk.merge(base, adapter, tmp_path / "merged", allow={"other-base"})
    assert "infinity" not in caplog.text


def test_a_value_that_the_dtype_of_the_result_cannot_hold_is_refused(tmp_path: Path) -> None:
    base, adapter = nan_base(tmp_path, 1e6)
    with pytest.raises(MergeError, match=r"up_proj\.weight has values that are not finite in torch\.float16.*bfloat16"):
        lk.merge(base, adapter, tmp_path / "merged", allow={"other-base"}, dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_a_file_that_an_earlier_merge_finished_is_looked_at_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = nan_base(tmp_path, float("nan"))

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("lora_kit.merging.merge.proof.check_retention", fail)
        with pytest.raises(StorageError, match="stopped"):
            lk.merge(base, adapter, tmp_path / "merged", allow={"other-base"})
    caplog.clear()
    lk.merge(base, adapter, tmp_path / "merged", allow={"other-base"})
    assert "model.layers.1.mlp.up_proj.weight: is its file damaged" in caplog.text


def test_the_command_line_says_it_once_and_strict_makes_it_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = nan_base(tmp_path, float("nan"))
    merge = ["merge", "--base", str(base), "--adapter", str(adapter), "--allow", "other-base"]
    assert main([*merge, "--out", str(tmp_path / "strict"), "--strict"]) == 4
    assert not (tmp_path / "strict").exists()
    capsys.readouterr()
    assert main([*merge, "--out", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().err.count("warning: the base has NaN or infinity") == 1
