"""Faults of `adapter_config.json`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.folder import CONFIG, WEIGHTS
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.errors import AdapterError, ConfigError
from tests.faults.adapter_acts import GENERATE, adapter_fault, damaged, foreign, load
from tests.faults.fault import Act, Fault
from tests.support import folders


def _text(text: bytes) -> Act:
    return damaged(lambda data: text, file=CONFIG)


def _row(name: str, make: Act, says: str = "", **more: Any) -> Fault:
    return adapter_fault(name, make, says, **{"error": ConfigError, **more})


def _number(name: str, value: Any) -> Fault:
    return _row(f"{name} of {value!r:.12}", foreign(**{name: value}), name)


def _remove(folder: Path) -> None:
    (folders.foreign(folder / "adapter") / CONFIG).unlink()


def _raw_field(name: str, value: str) -> Act:
    """Return what writes a field as text that Python's JSON would not write."""

    def damage(data: bytes) -> bytes:
        text = json.dumps({**json.loads(data), name: "HERE"})
        return text.replace('"HERE"', value).encode()

    return damaged(damage, file=CONFIG)


def _tear(folder: Path) -> None:
    """Put the weights of a later save beside the config of an earlier one."""
    folders.adapter(seed=1).save(folder / "adapter")
    later = folders.adapter(seed=2).save(folder / "later")
    os.replace(later / WEIGHTS, folder / "adapter" / WEIGHTS)


def _keep_unknown(folder: Path) -> None:
    """Unknown fields are there again after the adapter was loaded and saved."""
    load(folder)
    again = Adapter.load(folder / "adapter").save(folder / "again")
    assert json.loads((again / CONFIG).read_text())["of_tomorrow"] == {"x": [1]}


def _head_missing() -> Act:
    values = folders.tensors() | {PREFIX + "lm_head.weight": torch.ones(5, 32)}
    return foreign(values, modules_to_save=["lm_head"])


def _generate_on_its_own_base(name: str, base: str, error: type[Exception], says: str) -> Fault:
    """A base's name in the config is shown, and nothing is fetched or opened because of it."""
    command = tuple(word for word in GENERATE if word not in ("--base", "base"))
    return _row(name, foreign(base_model_name_or_path=base), says, error=error, command=command, act=_infer, peft=None)


def _infer(folder: Path) -> None:
    from lora_kit.models.infer_base import infer_base
    from lora_kit.models.locate import locate_base

    locate_base(infer_base([str(folder / "adapter")]))


_SLOW_PATTERN = "(" + "(a|aa)+" + ")+$"
CONFIGS: tuple[Fault, ...] = (
    _row("missing", _remove, "adapter_config.json"),
    _row("cut short", damaged(lambda data: data[:40], file=CONFIG), "line 1 column"),
    _row("empty", _text(b""), "not JSON"),
    _row("a list", _text(b"[1]"), "found list"),
    _row("not UTF-8", _text(b'{"r": "\xff"}'), "not UTF-8 at line 1 column 8", error=AdapterError),
    _row("nested 100,000 deep", _text(b'{"a":' * 100_000), "deep"),
    _row("larger than 1 MB", _text(b" " * (2**20 + 1)), "at most 1,048,576", error=AdapterError),
    _row("a field twice", _text(b'{"r": 2, "r": 3}'), "twice"),
    *(_number("r", value) for value in (0, -4, 3_000_000, "8", 8.5, True, None, [8])),
    *(_number("lora_alpha", value) for value in ("16", 0, True, 1e39, 1e-320)),
    _row("lora_alpha of NaN", _raw_field("lora_alpha", "NaN"), "NaN"),
    _row("lora_alpha of infinity", _raw_field("lora_alpha", "1e999")),
    _row("rank of 5,000 digits", _raw_field("r", "9" * 5_000)),
    _row("another method of PEFT", foreign(peft_type="IA3"), "IA3"),
    _row("a method that is none", foreign(peft_type={"a": 1})),
    _row(
        "unknown fields",
        foreign(of_tomorrow={"x": [1]}),
        "unknown fields are kept",
        error=None,
        act=_keep_unknown,
        writes=True,
    ),
    _row(
        "a pattern that backtracks for ever", foreign(target_modules=r"(.*a)*(.*b)*(.*c)*(.*d)*x$"), error=AdapterError
    ),
    _row("a pattern that nests repetitions", foreign(target_modules=_SLOW_PATTERN), error=AdapterError),
    _row("a pattern that is none", foreign(target_modules="(["), "target_modules|expression"),
    _row("targets that match nothing", foreign(target_modules=["query"]), "q_proj", error=AdapterError),
    _row("layers that disagree with the tensors", foreign(layers_to_transform=[0]), "layers.1", error=AdapterError),
    _row("DoRA without magnitudes", foreign(use_dora=True), "a magnitude is missing", error=AdapterError),
    _row("a saved module that the file has not", foreign(modules_to_save=["lm_head"]), "lm_head", error=AdapterError),
    _row("a head of another size", _head_missing(), r"\(5, 32\)", error=AdapterError),
    _row("replicated layers", foreign(layer_replication=[[0, 2]]), "layer_replication"),
    _row(
        "names to import",
        foreign(auto_mapping={"base_model_class": "os", "parent_library": "os"}, megatron_core="os"),
        error=None,
    ),
    _row("starts from a changed base", foreign(init_lora_weights="pissa"), "changed base"),
    _row("a torn pair of config and weights", _tear, "changed since it was saved", error=AdapterError),
    _generate_on_its_own_base(
        "a base that is a URL", "https://x.invalid/\x1b[31mbase", ConfigError, r"x\.invalid/\\x1b"
    ),
    _generate_on_its_own_base("a base outside", "../../../etc", ConfigError, r"etc"),
    _generate_on_its_own_base("a base that is an absolute path", "/etc", ConfigError, "/etc"),
)
