"""Faults of a base: what a merge, a load and the command line make of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_kit as lk
from lora_kit.errors import BaseMismatchError, BaseModelError, LoraKitError, MergeError
from lora_kit.merging.merge import merge
from lora_kit.targets.fingerprint import fingerprint
from tests.faults.fault import Act, Fault
from tests.support import folders, hub_cache, merging, tiny

MERGE = ("merge", "--base", "base", "--adapter", "adapter", "--out", "merged")
_INDEX = "model.safetensors.index.json"


def _merge(folder: Path) -> None:
    merge(folder / "base", folder / "adapter", folder / "merged")


def _row(
    name: str,
    make: Act,
    says: str,
    *,
    error: type[LoraKitError] | None = BaseModelError,
    act: Act = _merge,
    **more: Any,
) -> Fault:
    return Fault(name=name, make=make, act=act, error=error, says=says, **{"command": MERGE, **more})


def _images(folder: Path) -> None:
    """A base that reads images: nothing in it takes tokens."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    model = transformers.ViTForImageClassification(config)
    shutil.rmtree(folder / "base")
    model.save_pretrained(folder / "base")
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name="x")
    bank.save("x", folder / "adapter")


def _publish(folder: Path) -> None:
    folders.adapter().save(folder / "adapter")
    hub_cache.add_repository(folder / "cache", "org/model", folder / "base")


def _merge_from_branch(folder: Path) -> None:
    merge("org/model", folder / "adapter", folder / "merged")


def _with_adapter(make: Act) -> Act:
    def both(folder: Path) -> None:
        folders.adapter().save(folder / "adapter")
        make(folder)

    return both


def _config(**fields: Any) -> Act:
    def change(folder: Path) -> None:
        file = folder / "base" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return _with_adapter(change)


def _shards(damage: Callable[[Path], object]) -> Act:
    """Return what writes the base in shards and damages it."""

    def write(folder: Path) -> None:
        (folder / "base" / "model.safetensors").unlink()
        tiny.llama().save_pretrained(folder / "base", max_shard_size="20KB")
        damage(folder / "base")

    return _with_adapter(write)


def _first(base: Path) -> Path:
    return min(base.glob("model-*.safetensors"))


def _cut(base: Path) -> None:
    os.truncate(_first(base), 1_000)


def _index_outside(base: Path) -> None:
    os.rename(_first(base), base.parent / "outside.safetensors")
    index = json.loads((base / _INDEX).read_text())
    missing = _first(base).name.replace("00002", "00001")
    index["weight_map"] = {k: "../outside.safetensors" if v == missing else v for k, v in index["weight_map"].items()}
    (base / _INDEX).write_text(json.dumps(index))


def _index_of_another(base: Path) -> None:
    index = json.loads((base / _INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = dict.fromkeys(index["weight_map"], names[0])
    (base / _INDEX).write_text(json.dumps(index))


def _made_for_another(folder: Path) -> None:
    other = fingerprint(tiny.llama(seed=9), name="the other")
    lk.Adapter(folders.config(), folders.tensors(), record={"base": other}).save(folder / "adapter")


def _load_on_another(folder: Path) -> None:
    lk.attach(tiny.llama(), slots=1).load("x", folder / "adapter")


def _merge_on_another(folder: Path) -> None:
    merge(folder / "base", folder / "adapter", folder / "merged", allow={"other-base"})


def _tied(folder: Path) -> None:
    merging.base_folder(folder / "base", tiny.llama(tie=True))
    merging.adapter_folder(folder / "base", folder / "adapter", target_modules=["embed_tokens"])


def _merged_before(folder: Path) -> None:
    folders.adapter().save(folder / "adapter")
    os.rename(folder / "base", folder / "original")
    merge(folder / "original", folder / "adapter", folder / "base")


def _change_weight(value: float) -> Act:
    def change(folder: Path) -> None:
        file = folder / "base" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, file, metadata={"format": "pt"})

    return _with_adapter(change)


def _huge(folder: Path) -> None:
    values = {key: tensor * 1e7 for key, tensor in folders.tensors().items()}
    folders.foreign(folder / "adapter", values)


def _code(folder: Path) -> None:
    """A base whose config asks to run a file of its own, which would leave a trace."""
    (folder / "base" / "modeling_x.py").write_text("import os; os.mkdir('it-ran')\n")
    _config(auto_map={"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"}, model_type="x")(folder)


def _load_base(folder: Path) -> None:
    lk.load_base(folder / "base")


GENERATE = ("generate", "--base", "base", "--prompt", "ab", "--max-new-tokens", "1")
BASES: tuple[Fault, ...] = (
    _row(
        "another base of the same shapes",
        _made_for_another,
        "made for the other",
        error=BaseMismatchError,
        act=_load_on_another,
    ),
    _row(
        "another base, allowed",
        _made_for_another,
        "another base",
        error=None,
        act=_merge_on_another,
        writes=True,
        command=(*MERGE, "--allow", "other-base", "--replace"),
    ),
    _row(
        "quantized",
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantized",
        error=MergeError,
    ),
    _row("tied weights that the adapter changes", _tied, "shared", error=MergeError),
    _row("merged already with this adapter", _merged_before, "already", error=MergeError),
    _row("a shard cut short", _shards(_cut), "model-00001"),
    _row("a shard missing", _shards(lambda base: _first(base).unlink()), "model-00001"),
    _row(
        "a shard that the index does not know",
        _shards(lambda base: save_file({"w": torch.ones(2)}, base / "model-00099-of-00099.safetensors")),
        "model-00099",
    ),
    _row("an index that leads outside", _shards(_index_outside), "outside"),
    _row("an index that is of other files", _shards(_index_of_another), r"model-0000\d"),
    _row("an index that is no JSON", _shards(lambda base: (base / _INDEX).write_text("{")), "index.json"),
    _row("no weights", _with_adapter(lambda folder: (folder / "base" / "model.safetensors").unlink()), "base"),
    _row(
        "weights that are a FIFO",
        _with_adapter(
            lambda folder: (
                (folder / "base" / "model.safetensors").unlink(),
                os.mkfifo(folder / "base" / "model.safetensors"),
            )
        ),
        "model.safetensors",
    ),
    _row("a config that asks for code", _code, "code of its own|never", act=_load_base, command=GENERATE),
    _row("a billion layers", _config(num_hidden_layers=10**9), "at most 4,096", act=_load_base, command=GENERATE),
    _row(
        "a config that is no JSON",
        _with_adapter(lambda folder: (folder / "base" / "config.json").write_text("{")),
        "not JSON",
    ),
    _row(
        "a config cut by a byte of another encoding",
        _with_adapter(lambda folder: (folder / "base" / "config.json").write_bytes(b'{"\xe9')),
        "not UTF-8",
    ),
    _row(
        "no tokenizer",
        _with_adapter(lambda folder: (folder / "base" / "tokenizer.json").unlink()),
        "tokenizer",
        act=_load_base,
        command=GENERATE,
    ),
    _row(
        "a tokenizer of a terabyte",
        _with_adapter(lambda folder: os.truncate(folder / "base" / "tokenizer.json", 2**40)),
        "1,099,511,627,776 bytes",
    ),
    _row(
        "a tokenizer that is no JSON",
        _with_adapter(lambda folder: (folder / "base" / "tokenizer.json").write_text("{")),
        "tokenizer",
        act=_load_base,
        command=GENERATE,
    ),
    _row(
        "a tokenizer of another kind of JSON",
        _with_adapter(lambda folder: (folder / "base" / "tokenizer.json").write_text("[1]")),
        "tokenizer",
        act=_load_base,
        command=GENERATE,
    ),
    _row(
        "settings of a tokenizer that are a list",
        _with_adapter(lambda folder: (folder / "base" / "tokenizer_config.json").write_text("[1]")),
        "tokenizer",
        act=_load_base,
        command=GENERATE,
    ),
    _row(
        "settings of generation that are a list",
        _with_adapter(lambda folder: (folder / "base" / "generation_config.json").write_text("[1]")),
        "",
        act=_load_base,
        command=GENERATE,
    ),
    _row(
        "NaN in a weight that nobody changes",
        _change_weight(float("nan")),
        "NaN or infinity",
        error=None,
        writes=True,
        command=(*MERGE, "--replace"),
    ),
    _row("no input embedding", _images, "", error=None, writes=True, command=(*MERGE, "--replace")),
    _row(
        "a branch of the hub",
        _publish,
        "may be another model tomorrow",
        error=None,
        writes=True,
        act=_merge_from_branch,
        command=("merge", "--base", "org/model", *MERGE[3:], "--replace"),
        during=hub_cache.use_cache,
    ),
    _row("a delta of 10^12 times its weight", _huge, "times its weight", error=MergeError),
)
