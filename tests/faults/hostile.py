"""Hostile recipes, damaged records, and what must be said of what looks right."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from markdown_it import MarkdownIt

import lora_kit as lk
from lora_kit.adapter.adapter_record import RECORD, check_files
from lora_kit.adapter.folder import CARD, CONFIG, WEIGHTS
from lora_kit.algebra.extract import extract
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, RecipeError, VerificationError
from lora_kit.generation.decoding import Sampling
from lora_kit.generation.generate import generate
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.train import train
from tests.faults.adapter_acts import damaged, load, load_with_peft
from tests.faults.fault import Act, Fault
from tests.support import folders, tiny

LEAST = {"base": "base", "data": {"train": "rows.jsonl"}, "out": "out"}


def _recipe(text: str, name: str = "recipe.yaml") -> Act:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def _fields(**sections: Any) -> Act:
    return _recipe(yaml.safe_dump({**LEAST, **sections}))


def _read(folder: Path) -> None:
    load_recipe(next(path for path in folder.iterdir() if path.stem == "recipe"))


def _recipe_fault(name: str, make: Act, says: str = "", *, file: str = "recipe.yaml") -> Fault:
    command = ("train", file, "--dry-run")
    return Fault(name=name, make=make, act=_read, error=RecipeError, says=says, command=command)


_BOMB = "a: &a [l,l,l,l,l,l,l,l,l]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: tuple[Fault, ...] = (
    *(
        _recipe_fault(f"aliases that grow in {key}", _recipe(f"{_BOMB}{key}: *i\n"), "values|unknown")
        for key in ("base", "out", "lora")
    ),
    _recipe_fault("an alias of itself", _recipe("&a base: *a\n"), "missing"),
    *(
        _recipe_fault(f"a tag: {tag}", _recipe(f"base: {tag}\nout: o\ndata: {{train: t}}\n"), "tag")
        for tag in ("!!bool maybe", "!!int ''", "!!timestamp x", "!!python/object/apply:os.system [ls]")
    ),
    _recipe_fault(
        "a number of 5,000 digits",
        _recipe("base: b\nout: o\ndata: {train: t}\nlora: {r: 0x" + "f" * 5_000 + "}\n"),
        "digits",
    ),
    _recipe_fault("a NUL in a name", _recipe('base: "a\\0b"\nout: o\ndata: {train: t}\n'), "NUL"),
    _recipe_fault("half of a surrogate pair", _recipe('base: "\\ud800"\nout: o\ndata: {train: t}\n'), "surrogate"),
    _recipe_fault("steps that no training reaches", _fields(train={"max_steps": 1e20}), "max_steps"),
    _recipe_fault("a beta of 2", _fields(train={"adam_beta2": 2.0}), "beta"),
    _recipe_fault(
        "a batch of 10^20 rows", _fields(train={"per_device_train_batch_size": 10**20}), "per_device_train_batch_size"
    ),
    _recipe_fault("a million workers", _fields(train={"dataloader_num_workers": 10**6}), "dataloader_num_workers"),
    _recipe_fault("an output of 300 letters", _fields(out="x" * 300), "300|bytes"),
    _recipe_fault(
        "a separator of 900,000 letters",
        _fields(data={"train": "rows.jsonl", "separator": "x" * 900_000}),
        "data.separator has 900,000 characters; at most",
    ),
    _recipe_fault("an unknown key", _fields(lora={"rnak": 4}), "rnak"),
    _recipe_fault("a key twice", _recipe("base: a\nbase: b\n"), "twice"),
    _recipe_fault("1,000 levels", _recipe("base: " + "[" * 1_000 + "]" * 1_000 + "\n"), "levels deep"),
    _recipe_fault(
        "1,000 levels of TOML",
        _recipe("base = " + "[" * 1_000 + "]" * 1_000 + "\n", "recipe.toml"),
        "",
        file="recipe.toml",
    ),
    _recipe_fault("a file of 2 MB", _recipe("#" * 2**21), "bytes"),
    _recipe_fault("a list", _recipe("- a\n"), "mapping"),
)


# Records


def _flip(name: str, old: bytes, new: bytes) -> Act:
    def damage(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return damaged(damage, file=name, saved=True)


def _verify(folder: Path) -> None:
    adapter = lk.Adapter.load(folder / "adapter")
    check_files(folder / "adapter", dict(adapter.record))


VERIFY = ("verify", "adapter")


def _record(
    name: str, make: Act, says: str = "", *, error: type[LoraKitError] | None = AdapterError, **more: Any
) -> Fault:
    return Fault(name=name, make=make, error=error, says=says, **{"act": _verify, "command": VERIFY, **more})


def _no_record(folder: Path) -> None:
    folders.foreign(folder / "adapter")


def _unprotected(folder: Path) -> None:
    """A record of format 2 has no digest of itself."""
    path = folders.adapter().save(folder / "adapter") / RECORD
    record = json.loads(path.read_text())
    del record["record_sha256"]
    path.write_text(json.dumps({**record, "format": 2}))


def _outside(folder: Path) -> None:
    from lora_kit.adapter.adapter_record import seal_record

    path = folders.adapter().save(folder / "adapter") / RECORD
    record = json.loads(path.read_text())
    record["files"]["../base/config.json"] = {"size": 1, "sha256": "0" * 64}
    path.write_bytes(seal_record(record))


def _place(put: Callable[[Path], object]) -> Act:
    def make(folder: Path) -> None:
        path = folders.adapter().save(folder / "adapter") / RECORD
        os.rename(path, folder / "outside")
        put(path)

    return make


def _alpha(folder: Path) -> None:
    """One bit of a digit: 8 becomes 9."""
    _flip(CONFIG, b'"lora_alpha": 8', b'"lora_alpha": 9')(folder)


def _flip_weight(folder: Path) -> None:
    damaged(lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], file=WEIGHTS, saved=True)(folder)


RECORDS: tuple[Fault, ...] = (
    _record("a bit of a record", _flip(RECORD, b'"digest"', b'"dicest"'), "changed since it was saved"),
    _record("a bit of a config", _alpha, "changed since it was saved", peft=load_with_peft),
    _record("a bit of the weights", _flip_weight, "changed since it was saved", peft=load_with_peft),
    _record("a bit of a card", _flip(CARD, b"#", b'"'), "README.md changed", error=VerificationError),
    _record(
        "a card of a terabyte",
        lambda folder: os.truncate(folders.adapter().save(folder / "adapter") / CARD, 2**40),
        "README.md changed",
        error=VerificationError,
    ),
    _record("a record of a later format", _flip(RECORD, b'"format": 3', b'"format": 4'), "format"),
    _record("a record that names a file outside", _outside, "no file beside it"),
    _record("a record that is a FIFO", _place(os.mkfifo), "not a regular file"),
    _record("a record that is a link out", _place(lambda path: path.symlink_to("../outside")), "leads out"),
    _record("a record that is empty", damaged(lambda data: b"", file=RECORD, saved=True), "not JSON"),
    _record("no record", _no_record, "can be checked", error=None, act=load, command=("inspect", "adapter")),
    _record("a record without a digest of itself", _unprotected, "", error=None),
)


# What must be said


def _extract_from(damage: Callable[[torch.Tensor], object]) -> Act:
    """Return what writes a fine-tune of the base, with a damage in a weight that is not adapted."""

    def make(folder: Path) -> None:
        from tests.support import merging

        model = tiny.llama()
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.add_(0.1)
            damage(model.model.embed_tokens.weight)
        merging.base_folder(folder / "tuned", model)

    return make


def _extract(folder: Path) -> None:
    extract(folder / "base", folder / "tuned", rank=2)


def _two_weight_files(folder: Path) -> None:
    target = folders.adapter().save(folder / "adapter")
    torch.save(folders.tensors(seed=7), target / "adapter_model.bin")


def _float64(folder: Path) -> None:
    folders.foreign(folder / "adapter", {key: tensor.double() for key, tensor in folders.tensors().items()})


def _name_with_markup(folder: Path) -> None:
    target = folders.adapter().save(folder / "<script>alert(1)<s>")
    page = MarkdownIt("commonmark", {"html": True}).render((target / CARD).read_text().partition("\n---\n")[2])
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def _raises(act: Callable[[], object]) -> Act:
    return lambda folder: act()


def _misuse(name: str, call: Callable[[], object], error: type[LoraKitError] = ConfigError) -> Fault:
    return Fault(name=name, make=lambda folder: None, act=_raises(call), error=error)


def _loaded() -> lk.AdapterBank:
    bank = lk.attach(tiny.llama(), slots=1)
    bank.load("a", folders.adapter())
    return bank


def _not_an_adapter() -> object:
    value: Any = 5
    return _loaded().load("q", value)


def _not_a_path() -> object:
    value: Any = None
    return lk.Adapter.load(value)


def _not_a_recipe() -> object:
    value: Any = 5
    return train(value)


def _not_rows() -> object:
    value: Any = 7
    return _loaded().rows(value).__enter__()


def _nan_base(folder: Path) -> None:
    from tests.support import merging

    model = tiny.llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    merging.base_folder(folder / "base", model)


def _generate(folder: Path) -> None:
    generate(str(folder / "base"), [None], "ab", sampling=Sampling(max_new_tokens=1))


GENERATE = ("generate", "--base", "base", "--adapter", "adapter", "--prompt", "ab", "--max-new-tokens", "1")
SAID: tuple[Fault, ...] = (
    Fault(
        name="weights of two formats", make=_two_weight_files, act=load, says="too, which is not read", command=GENERATE
    ),
    Fault(name="weights of 64 bits", make=_float64, act=load, says="float64 tensors are rounded", command=GENERATE),
    Fault(
        name="NaN in a base that generates",
        make=_nan_base,
        act=_generate,
        error=VerificationError,
        says="logits have NaN",
        command=("generate", "--base", "base", "--prompt", "ab", "--max-new-tokens", "1"),
    ),
    Fault(
        name="NaN in a fine-tune",
        make=_extract_from(lambda weight: weight[3].fill_(float("nan"))),
        act=_extract,
        says="NaN or infinity in model.embed_tokens.weight",
        writes=True,
        command=("extract", "--base", "base", "--tuned", "tuned", "--out", "out", "--rank", "2"),
    ),
    Fault(name="markup in an adapter's name", make=lambda folder: None, act=_name_with_markup, writes=True),
    _misuse("a number as an adapter", _not_an_adapter),
    _misuse("nothing as a folder", _not_a_path),
    _misuse("a number as a recipe", _not_a_recipe),
    _misuse("a number as rows", _not_rows),
)
