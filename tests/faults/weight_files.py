"""Faults of the file of weights."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kit.adapter.folder import OLD_WEIGHTS, WEIGHTS
from lora_kit.adapter.peft_keys import PREFIX
from tests.faults.adapter_acts import GENERATE, adapter_fault, damaged, foreign, load
from tests.faults.fault import Act, Fault
from tests.support import folders
from tests.support.folders import A0, B0, PATHS, raw, taken_apart

_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"


def _edit_header(edit: Callable[[dict[str, Any]], object]) -> Act:
    def damage(data: bytes) -> bytes:
        fields, payload = taken_apart(data)
        edit(fields)
        return raw(fields, payload)

    return damaged(damage)


def _repeat_key(data: bytes) -> bytes:
    fields, payload = taken_apart(data)
    text = json.dumps(fields)
    return raw(f"{text[:-1]}, {json.dumps(A0)}: {json.dumps(fields[A0])}}}".encode(), payload)


def _shift(fields: dict[str, Any], by: int) -> None:
    fields[B0]["data_offsets"] = [place + by for place in fields[B0]["data_offsets"]]


def _changed(**changes: Tensor | None) -> Act:
    values = {key: tensor for key, tensor in (folders.tensors() | changes).items() if tensor is not None}
    return foreign(values)


def _zero_b() -> dict[str, Tensor]:
    return {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in folders.tensors().items()}


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it-ran",)


def _old(value: Any, name: str = OLD_WEIGHTS) -> Act:
    def make(folder: Path) -> None:
        target = folders.foreign(folder / "adapter")
        (target / WEIGHTS).unlink()
        torch.save(value, target / name)

    return make


def _in_place(put: Callable[[Path], object]) -> Act:
    """Return what puts something else in the place of the file."""

    def make(folder: Path) -> None:
        path = folders.foreign(folder / "adapter") / WEIGHTS
        os.rename(path, folder / "outside.safetensors")
        put(path)

    return make


def _load_extra(folder: Path) -> None:
    load(folder, allow={"extra-keys"})


def _one_nan() -> Tensor:
    tensor = folders.tensors()[A0]
    tensor[1, 2] = float("nan")
    return tensor


def _without_prefix() -> dict[str, Tensor]:
    return {key.removeprefix(PREFIX): tensor for key, tensor in folders.tensors().items()}


def _row(name: str, make: Act, says: str = "", **more: Any) -> Fault:
    return adapter_fault(name, make, says, **more)


STRAY = {"base_model.model.model.norm.weight": torch.ones(32)}
WEIGHT_FILES: tuple[Fault, ...] = (
    _row("empty", damaged(lambda data: b""), "truncated: 0 bytes"),
    _row("seven bytes", damaged(lambda data: data[:7]), "truncated: 7 bytes"),
    _row("payload cut short", damaged(lambda data: data[:-1]), r"truncated: 2,047 bytes .* 2,048 are expected"),
    _row("cut short after it was saved", damaged(lambda data: data[:-1], saved=True), "bytes"),
    _row("bytes after the payload", damaged(lambda data: data + b"\0"), "corrupt: 1 bytes after"),
    _row("overlapping tensors", _edit_header(lambda fields: _shift(fields, -4)), "corrupt: invalid offset"),
    _row("a hole between tensors", _edit_header(lambda fields: _shift(fields, 4)), "corrupt: invalid offset"),
    _row("a key twice", damaged(_repeat_key), "occurs twice"),
    _row(
        "header of 2^63 bytes", damaged(lambda data: (2**63).to_bytes(8, "little") + data), "9,223,372,036,854,775,808"
    ),
    _row("header above the cap", damaged(lambda data: (2**23 + 1).to_bytes(8, "little") + data), "at most 8,388,608"),
    _row("shape that overflows", _edit_header(lambda f: f[A0].update(shape=[2**40] * 3)), "overflow"),
    _row(
        "shape of 2^40 by nothing",
        damaged(lambda data: raw({A0: {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}})),
    ),
    _row("unknown dtype", _edit_header(lambda fields: fields[A0].update(dtype="F5")), "unknown variant"),
    _row("whole numbers of 8 bits", _changed(**{A0: torch.ones(4, 32, dtype=torch.int8)})),
    _row("truth values", _changed(**{B0: torch.ones(32, 4, dtype=torch.bool)})),
    _row("a pickle under the name of safetensors", damaged(lambda data: pickle.dumps({"a": 1})), "a pickle"),
    _row("a pickle with code", _old({"a": _Bomb()}), "it may carry code"),
    _row("a pickle with code under the name of safetensors", _old({"a": _Bomb()}, WEIGHTS), "a pickle"),
    _row("plain tensors in an older file", _old(folders.tensors()), "reading plain tensors", error=None),
    _row("one NaN", _changed(**{A0: _one_nan()}), "q_proj.* NaN or infinity"),
    _row("one infinity", _changed(**{B0: torch.full((32, 4), float("inf"))}), "NaN or infinity"),
    _row("wrong dimensions, of all layers", foreign(folders.tensors(size=16)), f"{PATHS[0]}.*{PATHS[1]}"),
    _row("A transposed", _changed(**{A0: folders.tensors()[A0].T.contiguous()}), "A looks transposed"),
    _row("another rank than the config's", foreign(folders.tensors(rank=8)), "the config says rank 4"),
    _row("one key missing", _changed(**{B0: None}), "lora_B is missing"),
    _row("one layer missing", _changed(**{A0: None, B0: None}), "1 of 2 covered"),
    _row(
        "every lora_B missing",
        foreign({k: t for k, t in folders.tensors().items() if "lora_B" not in k}),
        "lora_B is missing",
    ),
    _row("keys without their prefix", foreign(_without_prefix()), "keys begin with base_model.model."),
    _row("no tensors", foreign({}), "holds no tensors"),
    _row("a key too many", foreign(folders.tensors() | STRAY), "norm.weight is not expected"),
    _row(
        "a key too many, allowed",
        foreign(folders.tensors() | STRAY),
        error=None,
        act=_load_extra,
        command=(*GENERATE, "--allow", "extra-keys"),
    ),
    _row("every lora_B zero", foreign(_zero_b()), "this adapter does nothing", error=None),
    _row(
        "a link out of the folder",
        _in_place(lambda path: path.symlink_to("../outside.safetensors")),
        "leads out of its folder",
    ),
    _row("a FIFO", _in_place(os.mkfifo), "not a regular file"),
    _row("a device", _in_place(lambda path: path.symlink_to("/dev/zero"))),
    _row("a folder", _in_place(os.mkdir), "not a regular file"),
    _row("a pointer of git-lfs", damaged(lambda data: _POINTER), "git lfs pull"),
)
