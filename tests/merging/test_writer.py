"""The streaming merge: bit for bit what a merge in memory gives, from any files, and every fault in it is caught."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import lora_kit as lk
from lora_kit.errors import BaseModelError, ConfigError, MergeError, StorageError
from lora_kit.merging import merge as run
from lora_kit.merging import model_files
from lora_kit.merging.checkpoint.shards import INDEX, WEIGHTS
from lora_kit.merging.merge import merge
from lora_kit.merging.planned_tensors import MergePlan, PlannedTensor
from lora_kit.merging.writing import fold_blocks, hashing_file, journal, writer
from lora_kit.models.loading import load_base
from tests.support import merging, processes, tiny
from tests.support.merging import ALL, changed, edited, refused, stored


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights are one block of rows; with blocks as small as they get they are several, as large ones are."""
    if request.param == "many blocks":
        monkeypatch.setattr(fold_blocks, "_BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(hashing_file, "_BUFFER_BYTES", 2048)  # so that its memory is used again and again


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return merging.base_folder(tmp_path / "base", tiny.llama())


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return merging.adapter_folder(base, tmp_path / "sql", target_modules=ALL)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    base = merging.base_folder(tmp_path / "sharded", tiny.llama())
    (base / WEIGHTS).unlink()
    tiny.llama().save_pretrained(base, max_shard_size="20KB")
    return base


def in_memory(base: Path, adapter: Path, **how: Any) -> dict[str, Tensor]:
    """The state dict after a merge of the loaded model."""
    model = load_base(base, **how).model
    bank = lk.attach(model, dtype=torch.float32)
    bank.load("x", adapter)
    bank.merge("x")
    bank.detach()
    return model.state_dict()


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert not [key for key in wanted if found[key].dtype != wanted[key].dtype]
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]


# What comes out


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (tiny.llama, {"target_modules": ALL}),
        (lambda dtype: tiny.llama(dtype=dtype, tie=True), {"target_modules": ALL}),
        (tiny.llama, {"target_modules": ["embed_tokens", "lm_head"]}),
        (tiny.llama, {"use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}}),
        (tiny.gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    ids=["llama", "tied llama", "embedding and head", "rslora and patterns", "gpt2"],
)
def test_the_result_is_that_of_a_merge_in_memory_bit_for_bit(
    tmp_path: Path, family: Callable[..., Any], fields: dict[str, Any], dtype: torch.dtype
) -> None:
    base = merging.base_folder(tmp_path / "base", family(dtype=dtype))
    adapter = merging.adapter_folder(base, tmp_path / "sql", **fields)
    report = merge(base, adapter, tmp_path / "merged")
    assert_same(load_base(tmp_path / "merged").model.state_dict(), in_memory(base, adapter))
    assert report.counts["folded"] == len(report.tensors) == len(lk.Adapter.load(adapter).pairs())
    assert stored(tmp_path / "merged").keys() == stored(base).keys()


@pytest.mark.usefixtures("blocks")
def test_a_head_and_pairs_of_a_classifier_are_merged_as_in_memory(tmp_path: Path) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.bert(dtype=torch.bfloat16))
    adapter = mood(base, tmp_path / "mood", target_modules=["query", "dense"])
    report = merge(base, adapter, tmp_path / "merged")
    how: dict[str, Any] = {"task": "classify", "num_labels": 3}
    assert_same(load_base(tmp_path / "merged", **how).model.state_dict(), in_memory(base, adapter, **how))
    assert report.counts["replaced"] == 2


def mood(base: Path, folder: Path, **fields: Any) -> Path:
    head: dict[str, Any] = {"task": "classify", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    return merging.adapter_folder(base, folder, **{**head, **fields})


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("family", "names"), [(tiny.llama, ["q_proj", "down_proj"]), (tiny.gpt2, ["c_attn", "c_fc"])])
def test_a_dora_is_merged(tmp_path: Path, family: Callable[..., Any], names: list[str]) -> None:
    base = merging.base_folder(tmp_path / "base", family())
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=names, use_dora=True)
    merge(base, adapter, tmp_path / "merged", verify="logits")
    found, wanted = load_base(tmp_path / "merged").model.state_dict(), in_memory(base, adapter)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("family", "names"), [(tiny.llama, ["q_proj", "down_proj"]), (tiny.gpt2, ["c_attn", "c_fc"])])
@pytest.mark.parametrize(("base_dtype", "dtype"), [("bfloat16", "float32"), ("float32", None), ("float16", "float32")])
def test_a_dora_in_fp32_is_within_one_rounding_of_its_formula(
    tmp_path: Path, family: Callable[..., Any], names: list[str], base_dtype: str, dtype: str | None
) -> None:
    base = merging.base_folder(tmp_path / "base", family(dtype=getattr(torch, base_dtype)))
    adapter = lk.Adapter.load(
        merging.adapter_folder(base, tmp_path / "sql", target_modules=names, use_dora=True, lora_alpha=8)
    )
    merge(base, adapter, tmp_path / "merged", dtype=dtype, verify="logits")
    before, after = stored(base), stored(tmp_path / "merged")
    prefix = "" if f"{next(iter(adapter.pairs()))}.weight" in before else "transformer."
    for path, weights in adapter.pairs().items():
        key = f"{path}.weight".removeprefix(prefix)
        own, found = (t[key].double().T if family is tiny.gpt2 else t[key].double() for t in (before, after))
        assert weights.magnitude is not None
        direction = own + adapter.config.scaling_of(path) * weights.b.double() @ weights.a.double()
        wanted = weights.magnitude.double().unsqueeze(1) * direction / direction.norm(dim=1, keepdim=True)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_a_dora_norm_from_rounded_factors_is_found_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama(dtype=torch.bfloat16))
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["q_proj"], use_dora=True)
    real = fold_blocks.dora_scale
    monkeypatch.setattr(fold_blocks, "dora_scale", lambda weight, *given: real(weight.bfloat16(), *given))
    assert "rounding allows" in refused(base, adapter, tmp_path / "merged", dtype="float32")


def test_adapters_are_added_with_their_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = merging.adapter_folder(base, tmp_path / "other", r=2, target_modules=["q_proj", "lm_head"])
    report = merge(base, [(adapter, 0.5), (lk.Adapter.load(other), -2)], tmp_path / "merged")
    own, found = stored(base), stored(tmp_path / "merged")
    wanted = {name: tensor.double() for name, tensor in own.items()}
    for folder, weight in ((adapter, 0.5), (other, -2.0)):
        value = lk.Adapter.load(folder)
        for path, pair in value.pairs().items():
            scaling = weight * value.config.scaling_of(path)
            wanted[f"{path}.weight"] += scaling * (pair.b.double() @ pair.a.double())
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-6)
    assert list(report.adapters.values()) == [0.5, -2.0]
    with pytest.raises(MergeError, match="already"):
        merge(tmp_path / "merged", other, tmp_path / "again")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "expected"),
        ([("sql", 0.0)], "expected"),
        ([("sql", float("nan"))], "expected"),
        ([("sql", 1.0), ("sql", 1.0)], "twice"),
    ],
)
def test_weights_that_make_no_sense_are_refused(
    base: Path, adapter: Path, tmp_path: Path, given: list[tuple[str, float]], told: str
) -> None:
    with pytest.raises((ConfigError, MergeError), match=told):
        merge(base, [(tmp_path / name, weight) for name, weight in given], tmp_path / "merged")


def test_a_dora_and_a_saved_module_have_no_weight(base: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "saved": {"modules_to_save": ["lm_head"]}}
    for name, fields in kinds.items():
        folder = merging.adapter_folder(base, tmp_path / name, target_modules=["q_proj"], **fields)
        with pytest.raises(MergeError, match="weight"):
            merge(base, [(folder, 0.5)], tmp_path / "merged")


def test_dtype_is_that_of_the_weights_and_of_the_config(tmp_path: Path) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama())
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=ALL)
    report = merge(base, adapter, tmp_path / "merged", dtype="bf16")
    assert {tensor.dtype for tensor in stored(tmp_path / "merged").values()} == {torch.bfloat16}
    assert load_base(tmp_path / "merged").model.dtype == torch.bfloat16
    assert report.counts["cast"] == len(stored(base)) - len(report.tensors)
    # Rounded once: the sum of the fp32 weight and the delta, not of a weight that was rounded before.
    exact = in_memory(base, adapter)
    assert_same(stored(tmp_path / "merged"), {key: tensor.bfloat16() for key, tensor in exact.items()})


def test_progress_goes_up_to_all_there_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    merge(base, adapter, tmp_path / "merged", progress=lambda done, total: told.append((done, total)))
    done = [one for one, _ in told]
    assert done == sorted(done)
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in stored(base).values())


# What goes in


def test_shards_stay_as_they_are(sharded: Path, tmp_path: Path) -> None:
    base = sharded
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["q_proj"])
    report = merge(base, adapter, tmp_path / "merged")
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(report.files) == files
    for file in files:
        own, found = (safetensors.torch.load_file(folder / file) for folder in (base, tmp_path / "merged"))
        assert own.keys() == found.keys()
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "merged"))
    assert before["weight_map"] == after["weight_map"]
    assert before["metadata"]["total_size"] == after["metadata"]["total_size"]
    untouched = next(
        file for file in files if not any("q_proj" in name for name in safetensors.torch.load_file(base / file))
    )
    assert (base / untouched).read_bytes() == (tmp_path / "merged" / untouched).read_bytes()
    assert_same(load_base(tmp_path / "merged").model.state_dict(), in_memory(base, adapter))


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("form", ["one file", "shards", "old", "transposed"])
def test_a_base_of_pickled_tensors_is_read_and_written_as_safetensors(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, dtype: str | None
) -> None:
    merge(base, adapter, tmp_path / "wanted", dtype=dtype)
    monkeypatch.setattr(writer, "_CAST_ELEMENTS", 100)
    tensors = stored(base)
    if form == "transposed":
        tensors = {name: tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    (base / WEIGHTS).unlink()
    if form == "shards":
        halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
        places: dict[str, str] = {}
        for number, half in enumerate(halves, 1):
            file = f"pytorch_model-0000{number}-of-00002.bin"
            torch.save(half, base / file)
            places |= dict.fromkeys(half, file)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=form != "old")
    report = merge(base, adapter, tmp_path / "merged", dtype=dtype)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)] if form == "shards" else [WEIGHTS]
    assert list(report.files) == names
    assert_same(stored(tmp_path / "merged"), stored(tmp_path / "wanted"))


def test_a_base_without_the_prefix_of_the_whole_model_is_mapped_as_transformers_does(tmp_path: Path) -> None:
    model = tiny.llama(tie=True)
    base = merging.base_folder(tmp_path / "base", model)
    bare = {name.removeprefix("model."): t for name, t in stored(base).items()}
    safetensors.torch.save_file(bare, base / WEIGHTS, metadata={"format": "pt"})
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=ALL)
    merge(base, adapter, tmp_path / "merged", verify="logits")
    assert stored(tmp_path / "merged").keys() == bare.keys()
    assert_same(load_base(tmp_path / "merged").model.state_dict(), in_memory(base, adapter))


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=96,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config).eval()


def test_experts_that_transformers_fuses_go_through_and_are_not_folded_into(tmp_path: Path) -> None:
    base = merging.base_folder(tmp_path / "base", mixtral())
    assert any(".experts.2." in name for name in stored(base))
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["q_proj", "o_proj"])
    merge(base, adapter, tmp_path / "merged", verify="logits")
    assert_same(load_base(tmp_path / "merged").model.state_dict(), in_memory(base, adapter))
    whole = merging.adapter_folder(base, tmp_path / "whole", target_modules=["q_proj"], modules_to_save=["mlp"])
    with pytest.raises(MergeError, match="another form"):
        merge(base, whole, tmp_path / "other")


def test_a_new_head_is_added_and_the_old_one_left_out(tmp_path: Path) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama(dtype=torch.bfloat16))
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    adapter = merging.adapter_folder(base, tmp_path / "mood", task="classify", **fields)
    named = lk.Adapter.load(adapter)
    labeled = lk.Adapter(named.config, named.tensors, record={**named.record, "labels": ["sad", "glad", "calm"]})
    report = merge(base, labeled, tmp_path / "merged", verify="logits")
    assert report.counts["added"] == 1
    assert report.left_out == ("lm_head.weight",)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.score.weight, named.saved()["score.weight"].bfloat16())
    assert merged.config.id2label == {0: "sad", 1: "glad", 2: "calm"}
    assert merged.config.architectures == ["LlamaForSequenceClassification"]


def test_what_belongs_to_the_model_is_carried_and_code_is_not(base: Path, adapter: Path, tmp_path: Path) -> None:
    given = {"chat_template.jinja": "{{ x }}", "preprocessor_config.json": "{}", "LICENSE": "mine", "evil.py": "boom"}
    for name, text in given.items():
        (base / name).write_text(text)
    merge(base, adapter, tmp_path / "merged")
    own, found = merging.contents(base), merging.contents(tmp_path / "merged")
    assert "evil.py" not in found
    for name in [
        "chat_template.jinja",
        "preprocessor_config.json",
        "LICENSE",
        "tokenizer.json",
        "generation_config.json",
    ]:
        assert found[name] == own[name]
    assert "that survived" in found["README.md"].decode()


@pytest.mark.parametrize("broken", ["cut", "gone", "other keys", "leads out", "pointer", "empty index"])
def test_a_base_whose_files_are_damaged_is_refused_and_the_file_named(
    sharded: Path, adapter: Path, tmp_path: Path, broken: str
) -> None:
    base = sharded
    file = sorted(base.glob("*.safetensors"))[1]
    index = json.loads((base / INDEX).read_text())
    places = index["weight_map"]
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif broken == "gone":
        file.unlink()
    elif broken == "other keys":
        places["lm_head.bias"] = file.name
    elif broken == "leads out":
        places[next(iter(places))] = "../base/model.safetensors"
    elif broken == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        places.clear()
    (base / INDEX).write_text(json.dumps(index))
    named = "index" if broken in ("leads out", "empty index") else file.name
    with pytest.raises(BaseModelError, match=named):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("what", ["code", "no tensors", "bytes", "a stride of 0"])
def test_a_pickle_that_is_no_file_of_tensors_is_refused(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (base / WEIGHTS).unlink()
    made = {
        "code": {"x": _Evil()},
        "no tensors": {"x": 1},
        "bytes": {},
        "a stride of 0": {"x": torch.zeros(1).expand(9)},
    }
    torch.save(made[what], base / "pytorch_model.bin")
    if what == "bytes":
        (base / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(BaseModelError, match="plain tensors"):
        merge(base, adapter, tmp_path / "merged")
    assert not Path("evil").exists()


@pytest.mark.parametrize("what", ["a tensor of no use", "a tensor that is missing", "another shape"])
def test_a_base_that_is_not_its_own_model_is_refused(base: Path, adapter: Path, tmp_path: Path, what: str) -> None:
    tensors = stored(base)
    if what == "a tensor of no use":
        tensors["model.layers.0.gremlin"] = torch.zeros(3)
    elif what == "a tensor that is missing":
        del tensors["model.norm.weight"]
    else:
        tensors["model.norm.weight"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"gremlin|model\.norm\.weight"):
        merge(base, adapter, tmp_path / "merged")


# Tied weights


@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["wte"]])
def test_tied_weights_are_written_apart_where_that_is_allowed(tmp_path: Path, names: list[str]) -> None:
    model = tiny.gpt2() if names == ["wte"] else tiny.llama(tie=True)
    base = merging.base_folder(tmp_path / "base", model)
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=names)
    with pytest.raises(MergeError, match="untie"):
        merge(base, adapter, tmp_path / "merged")
    report = merge(base, adapter, tmp_path / "merged", allow=["untie"], verify="logits")
    assert len(report.untied) == 2
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    own, found = stored(base), stored(tmp_path / "merged")
    assert found.keys() - own.keys() == {"lm_head.weight"}
    table = next(name for name in own if "embed_tokens" in name or "wte" in name)
    both = {"embed_tokens": table, "wte": table, "lm_head": "lm_head.weight"}
    changed = {both[name] for name in names}
    for name in (table, "lm_head.weight"):
        assert torch.equal(found[name], own[table]) == (name not in changed)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight


def test_weights_that_the_files_hold_apart_are_apart_whatever_the_config_says(tmp_path: Path) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama(tie=True))
    tensors = stored(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    tensors["model.norm.weight"][3] = float("nan")  # of no adapter, and copied as it is
    safetensors.torch.save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["lm_head"])
    merge(base, adapter, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(stored(tmp_path / "merged")["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert not torch.equal(stored(tmp_path / "merged")["lm_head.weight"], tensors["lm_head.weight"])


# What is wrong is caught


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("doubled", "away from base"),
        ("halved", "away from base"),
        ("dropped", "away from base"),
        ("gate and up swapped", "away from base"),
        ("weights swapped", "away from base"),
        ("leaked", "other numbers"),
        ("zeroed", "other numbers"),
        ("forgotten", "has no"),
        ("invented", "of no use"),
    ],
)
def test_a_fold_that_is_not_the_adapters_is_found_in_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, told: str, dtype: torch.dtype
) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama(dtype=dtype))
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=ALL)
    gate, up, norm = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"

    def edit(plan: MergePlan) -> MergePlan:
        by_name = {entry.name: entry for entry in plan.entries}
        factors = {"doubled": 2.0, "halved": 0.5}
        other = {gate: by_name[up], up: by_name[gate]}

        def one(entry: PlannedTensor) -> PlannedTensor | None:
            if what in factors and entry.name == up:
                update = dataclasses.replace(entry.updates[0], scaling=entry.updates[0].scaling * factors[what])
                return dataclasses.replace(entry, updates=(update,))
            if what == "dropped" and entry.name == up:
                return dataclasses.replace(entry, updates=())
            if what == "gate and up swapped" and entry.name in other:
                return dataclasses.replace(entry, updates=other[entry.name].updates)
            if what == "weights swapped" and entry.name in other:
                return dataclasses.replace(entry, source=other[entry.name].source)
            if what == "leaked" and entry.name == "lm_head.weight":
                return dataclasses.replace(entry, source=entry.source + 1)
            if what == "zeroed" and entry.name == norm:
                return dataclasses.replace(entry, source=torch.zeros_like(entry.source))
            if what == "forgotten" and entry.name == norm:
                return None
            if what == "invented" and entry.name == norm:
                return dataclasses.replace(entry, name="model.norm.gremlin") if entry.path else entry
            return entry

        if what == "invented":
            shard, entries = plan.shards[0]
            extra = dataclasses.replace(by_name[norm], name="model.gremlin")
            return dataclasses.replace(plan, shards=((shard, (*entries, extra)),))
        return changed(plan, one)

    edited(monkeypatch, edit)
    found = refused(base, adapter, tmp_path / "merged")
    assert found.startswith("VerificationError")
    assert told in found


@pytest.mark.parametrize("what", ["a byte", "the end", "more"])
@pytest.mark.parametrize("which", ["first", "last"])
def test_a_file_that_changes_after_it_was_written_is_found_by_its_digest(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, which: str
) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    hit = files[0 if which == "first" else -1]
    real = journal.check_read_back

    def disturbed(path: Path, expected: dict[str, Any]) -> None:
        data = bytearray(path.read_bytes())
        if path.name == hit:
            data[-3] ^= 1
            path.write_bytes({"a byte": data, "the end": data[:-4], "more": data + b"\0"}[what])
        real(path, expected)

    monkeypatch.setattr(journal, "check_read_back", disturbed)
    found = refused(sharded, adapter, tmp_path / "merged")
    assert found.startswith(f"VerificationError: {hit}")


def test_an_alias_that_the_config_still_ties_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama(tie=True))
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["embed_tokens"])
    monkeypatch.setattr(model_files, "compute_config_changes", lambda *given, **named: {})
    assert "ties" in refused(base, adapter, tmp_path / "merged", allow=["untie"])


def test_an_alias_that_was_not_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama(tie=True))
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=["embed_tokens"])
    edited(monkeypatch, lambda plan: changed(plan, lambda entry: None if entry.name == "lm_head.weight" else entry))
    assert "has no lm_head.weight" in refused(base, adapter, tmp_path / "merged", allow=["untie"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_weight_that_is_not_finite_is_refused_by_name(base: Path, tmp_path: Path, value: float) -> None:
    half = merging.base_folder(tmp_path / "half", tiny.llama(dtype=torch.float16))
    folder = merging.adapter_folder(half, tmp_path / "sql", target_modules=["q_proj"])
    adapter = lk.Adapter.load(folder)
    path = next(iter(adapter.pairs()))
    adapter.pairs()[path].b[0, 0] = value
    around = merging.beside(base)
    with pytest.raises(MergeError, match=f"{path}.*not finite"):
        merge(half, adapter, tmp_path / "merged")
    assert merging.beside(base) == around


def test_a_delta_that_rounding_eats_is_refused_with_a_table(tmp_path: Path) -> None:
    base = merging.base_folder(tmp_path / "base", tiny.llama(dtype=torch.bfloat16))
    adapter = merging.adapter_folder(base, tmp_path / "sql", target_modules=ALL, lora_alpha=0.01)
    found = refused(base, adapter, tmp_path / "merged")
    assert found.startswith("MergeError: less than 50% of 14 of 14 deltas")
    assert found.count("\n") >= 5
    assert "lost-delta" in found
    assert merge(base, adapter, tmp_path / "coarse", allow=["lost-delta"]).retention < 0.5
    assert merge(base, adapter, tmp_path / "fine", dtype="float32").retention > 0.99


def test_everything_an_adapter_holds_must_have_a_place(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.build_meta_model

    def forgetful(*given: Any, **named: Any) -> Any:
        found = real(*given, **named)
        names = {key: name for key, name in found.names.items() if "layers.1.mlp.up_proj" not in key}
        return dataclasses.replace(found, names=names)

    monkeypatch.setattr(run, "build_meta_model", forgetful)
    assert "model.layers.1.mlp.up_proj.weight, which the adapter changes" in refused(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(("how", "told"), [({"verify": "hope"}, "verify"), ({"allow": ["everything"]}, "allow")])
def test_arguments_that_are_not_known_are_refused(
    base: Path, adapter: Path, tmp_path: Path, how: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        merge(base, adapter, tmp_path / "merged", **how)


# Killed, or out of space


def test_a_disk_without_room_is_refused_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(base)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="bytes; 1,000 are free"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_merge_killed_at_any_call_leaves_nothing_or_all_and_the_next_one_finishes(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    place = tmp_path / "store"
    place.mkdir()
    merge(base, adapter, place / "x")
    whole = merging.contents(place / "x")
    shutil.rmtree(place / "x")
    seen = set()
    take = hashing_file.HashingFile._take

    def halved(file: Any, piece: memoryview) -> None:
        """One tensor in two goes, with a call to die at between them."""
        take(file, piece[: piece.nbytes // 2])
        if file._size < 20_000:
            os.fsync(file._file.fileno())
        take(file, piece[piece.nbytes // 2 :])

    for number in itertools.count(1):

        def work(number: int = number) -> None:
            processes.at_call(number, processes.die, below=place)
            pytest.MonkeyPatch().setattr(hashing_file.HashingFile, "_take", halved)
            merge(base, adapter, place / "x")

        ending = processes.in_child(work)
        there = (place / "x").exists()
        seen.add(there)
        if there:
            assert merging.contents(place / "x") == whole
            shutil.rmtree(place / "x")
        if ending == processes.SAVED:
            break
        assert ending == -signal.SIGKILL
        assert number < 200
    assert seen == {True, False}
    merge(base, adapter, place / "x")
    assert merging.contents(place / "x") == whole
    assert os.listdir(place) == ["x"]


def killed(base: Path, adapter: Path, out: Path, *, after: int) -> None:
    """A merge that dies once it has finished so many files."""

    def work() -> None:
        real, count = journal.FinishedFiles.finish, itertools.count(1)

        def finish(finished: journal.FinishedFiles, *given: Any, **named: Any) -> None:
            real(finished, *given, **named)
            if next(count) == after:
                processes.die()

        pytest.MonkeyPatch().setattr(journal.FinishedFiles, "finish", finish)
        merge(base, adapter, out)

    assert processes.in_child(work) == -signal.SIGKILL
    assert journal.journal_folder_of(out).is_dir()
    assert not out.exists()


@pytest.mark.parametrize(
    "since", ["nothing", "a byte of a file", "the journal", "the base", "a copy of the base", "a link"]
)
def test_a_merge_that_was_killed_is_taken_up_where_it_was_whole(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: str
) -> None:
    out, place = tmp_path / "merged", journal.journal_folder_of(tmp_path / "merged")
    wanted = merge(sharded, adapter, tmp_path / "unbroken" / out.name)
    files = list(wanted.files)
    killed(sharded, adapter, out, after=2)
    if since == "a byte of a file":
        (place / files[0]).write_bytes((place / files[0]).read_bytes()[:-1] + b"?")
    elif since == "the journal":
        (place / "journal.json").write_text("{")
    elif since == "the base":
        os.utime(sharded / "config.json")
    elif since == "a copy of the base":  # of the same size and time, as `cp -p` leaves it
        shard = next(sharded.glob("*.safetensors"))
        shutil.copy2(shard, tmp_path / "copy")
        os.replace(tmp_path / "copy", shard)
    elif since == "a link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    written: list[str] = []
    real = writer._write_file

    def counted(file: hashing_file.HashingFile, *given: Any, **named: Any) -> Any:
        written.append(Path(str(file._file.name)).name)
        return real(file, *given, **named)

    monkeypatch.setattr(writer, "_write_file", counted)
    report = merge(sharded, adapter, out)
    again = {"nothing": files[2:], "a byte of a file": [files[0], *files[2:]]}.get(since, files)
    assert written == again
    assert report.tensors == wanted.tensors
    assert report.files == wanted.files
    assert merging.contents(out) == merging.contents(tmp_path / "unbroken" / out.name)
    assert not os.path.lexists(place)
    assert since != "a link" or (tmp_path / "elsewhere" / "journal.json").exists()


def test_what_another_merge_had_finished_is_not_taken_up(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    other = merging.adapter_folder(sharded, tmp_path / "other", r=2)
    killed(sharded, other, out, after=2)
    merge(sharded, adapter, out)
    merge(sharded, adapter, tmp_path / "unbroken" / out.name)
    assert merging.contents(out) == merging.contents(tmp_path / "unbroken" / out.name)


def test_memory_is_filled_again_only_once_it_was_written(tmp_path: Path) -> None:
    class Slow(io.FileIO):
        """A disk that is slower than what makes the bytes."""

        def write(self, data: Any, /) -> int:
            time.sleep(0.005)
            return super().write(data)

    wanted, buffers = b"", collections.deque[Tensor]()
    with ThreadPoolExecutor(max_workers=1) as pool:
        for name in ("one", "two"):
            with Slow(tmp_path / name, "wb") as file:
                made = hashing_file.HashingFile(file, pool, buffers)
                for number in range(2 * hashing_file._MAX_PENDING):
                    made.reserve(hashing_file._BUFFER_BYTES, torch.uint8).fill_(number)
                facts = made.finish()
            wanted = b"".join(
                bytes([number]) * hashing_file._BUFFER_BYTES for number in range(2 * hashing_file._MAX_PENDING)
            )
            assert (tmp_path / name).read_bytes() == wanted
            assert facts == {"size": len(wanted), "sha256": hashlib.sha256(wanted).hexdigest()}
            # Nothing is there twice, and no more was made than may wait, be written and be filled at one time.
            assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers) <= hashing_file._MAX_PENDING + 2
