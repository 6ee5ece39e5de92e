"""Weight files and folders of others: read strictly, or refused in one typed error that says what is wrong."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import pickle
import random
import socket
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_kit as lk
from lora_kit.adapter.adapter_record import RECORD, RECORD_FORMAT, check_files, find_changed_files, seal_record
from lora_kit.adapter.folder import CARD, CONFIG, OLD_WEIGHTS, WEIGHTS, AdapterFolder
from lora_kit.adapter.peft_keys import PREFIX
from lora_kit.errors import AdapterError, ConfigError, LoraKitError, StorageError, VerificationError
from lora_kit.io import read
from lora_kit.io import safetensors as weights
from tests.support import folders
from tests.support.folders import A0, B0, PATHS, raw

Damage = Callable[[bytes], bytes]


def refused(folder: Path, kind: type[LoraKitError] = AdapterError) -> str:
    """What loading says: one typed error of what was given, naming the folder, without control characters."""
    with pytest.raises(kind) as caught:
        lk.Adapter.load(folder)
    told = str(caught.value)
    assert caught.value.exit_code == (3 if kind is StorageError else 2)
    assert folder.name in told
    assert all(line.isprintable() for line in told.splitlines())
    return told


@contextlib.contextmanager
def in_little_memory(most: int = 4 * 2**20) -> Iterator[None]:
    """The block allocates no more than this at any time, and takes no more than seconds."""
    began = time.process_time()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 5


def header(**changed: Any) -> Damage:
    """The header with fields of the first A set to other values; None takes one out."""

    def damage(data: bytes) -> bytes:
        fields, payload = folders.taken_apart(data)
        fields[A0] = {key: value for key, value in {**fields[A0], **changed}.items() if value is not None}
        return raw(fields, payload)

    return damage


def moved(by: int) -> Damage:
    """The second tensor's bytes begin elsewhere: a hole, or an overlap."""

    def damage(data: bytes) -> bytes:
        fields, payload = folders.taken_apart(data)
        begin, end = fields[B0]["data_offsets"]
        fields[B0]["data_offsets"] = [begin + by, end + by]
        return raw(fields, payload)

    return damage


def twice(data: bytes) -> bytes:
    fields, payload = folders.taken_apart(data)
    text = json.dumps(fields)
    return raw(f"{text[:-1]}, {json.dumps(A0)}: {json.dumps(fields[A0])}}}".encode(), payload)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "empty": (lambda data: b"", "truncated: 0 bytes"),
    "seven bytes": (lambda data: data[:7], "truncated: 7 bytes"),
    "header cut short": (lambda data: data[:40], r"truncated: 40 bytes, the header alone needs \d+"),
    "payload cut short": (lambda data: data[:-1], r"truncated: 2,047 bytes of tensors, 2,048 are expected"),
    "payload missing": (lambda data: data[:-2048], r"truncated: 0 bytes of tensors, 2,048 are expected"),
    "a byte more": (lambda data: data + b"\0", "corrupt: 1 bytes after the last tensor"),
    "a hole": (moved(4), "corrupt: invalid offset for tensor"),
    "an overlap": (moved(-4), "corrupt: invalid offset for tensor"),
    "negative offsets": (header(data_offsets=[-512, 0]), "integer `-512`, expected usize"),
    "offsets the wrong way": (header(data_offsets=[512, 0]), "corrupt: invalid offset for tensor"),
    "offsets of floats": (header(data_offsets=[0.0, 512.0]), "floating point `0.0`, expected usize"),
    "offsets of bools": (header(data_offsets=[False, 512]), "boolean `false`, expected usize"),
    "three offsets": (header(data_offsets=[0, 512, 512]), "invalid length 3, expected 2"),
    "a huge offset": (header(data_offsets=[0, 10**30]), "expected usize"),
    "a field too many": (header(device="cuda"), "dtype, shape and data_offsets are expected"),
    "no dtype": (header(dtype=None), "missing field `dtype`"),
    "no shape": (header(shape=None), "missing field `shape`"),
    "a shape of text": (header(shape="48"), "expected a sequence"),
    "a shape of floats": (header(shape=[4.0, 32.0]), "floating point `4.0`, expected usize"),
    "a shape of bools": (header(shape=[True, 128]), "boolean `true`, expected usize"),
    "a negative shape": (header(shape=[-4, -32]), "integer `-4`, expected usize"),
    "a shape that overflows": (header(shape=[2**40, 2**40, 2**40]), "overflow computing buffer size"),
    "a shape of terabytes of nothing": (
        lambda data: raw({A0: {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}),
        "at most 8 dimensions, none of 0, are read",
    ),
    "a thousand dimensions": (header(shape=[1] * 1_000 + [4, 32]), "at most 8 dimensions"),
    "another shape": (header(shape=[4, 31]), "invalid shape, data type, or offset"),
    "unknown dtype": (header(dtype="F5"), "unknown variant `F5`"),
    "dtype of another kind": (header(dtype=["F32"]), "invalid type: sequence"),
    "dtype of a mapping": (header(dtype={"F32": None}), "which is not supported"),
    "an entry of a list": (
        lambda data: raw({A0: ["F32", [2], [0, 8]]}, bytes(8)),
        "dtype, shape and data_offsets are expected",
    ),
    "a float of 8 bits": (header(dtype="F8_E4M3", shape=[16, 32]), "has dtype 'F8_E4M3', which is not supported"),
    "names twice": (twice, "occurs twice"),
    "an entry that is none": (lambda data: raw({A0: 5}), "integer `5`, expected struct"),
    "metadata that is none": (lambda data: raw({"__metadata__": {"a": 1}}), "integer `1`, expected a string"),
    "header of a list": (lambda data: raw([1]), "a JSON object was expected, found list"),
    "header that is no JSON": (lambda data: raw(b"{" + b"a" * 50), "not JSON: .* line 1 column 2"),
    "header that is no UTF-8": (lambda data: raw(b'{"\xff": 1}'), "corrupt header"),
    "header with NaN": (lambda data: raw(b'{"a": NaN}'), "NaN is not a number"),
    "header nested for ever": (lambda data: raw(b'{"a":' * 100_000), "nested too deeply"),
    "header of spaces": (lambda data: raw(b" " * 64), "not JSON"),
    "header of 2^63 bytes": (lambda data: (2**63).to_bytes(8, "little") + data, "header of 9,223,372,036,854,775,808"),
    "header above the cap": (lambda data: (2**23 + 1).to_bytes(8, "little") + data, "at most 8,388,608 are read"),
    "a pickle": (lambda data: pickle.dumps({"a": 1}), "a pickle under the name of safetensors"),
    "a zip": (lambda data: b"PK\x03\x04" + data, "a pickle under the name of safetensors"),
    "a git-lfs pointer": (lambda data: POINTER, "run 'git lfs pull'"),
    "a web page": (lambda data: b"<!DOCTYPE html><html>" * 9, "corrupt: a header of"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_weight_file_is_refused_and_the_damage_named(tmp_path: Path, name: str) -> None:
    folder = folders.foreign(tmp_path / "broken")
    damage, told = DAMAGES[name]
    (folder / WEIGHTS).write_bytes(damage((folder / WEIGHTS).read_bytes()))
    with in_little_memory(), pytest.raises(AdapterError, match=told):
        lk.Adapter.load(folder)
    assert WEIGHTS in refused(folder)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_after_saving_is_seen_whatever_it_is(tmp_path: Path, name: str) -> None:
    folder = folders.adapter().save(tmp_path / "broken")
    (folder / WEIGHTS).write_bytes(DAMAGES[name][0]((folder / WEIGHTS).read_bytes()))
    refused(folder)


def test_any_bit_that_flips_is_seen(tmp_path: Path) -> None:
    folder = folders.adapter().save(tmp_path / "flipped")
    data = (folder / WEIGHTS).read_bytes()

    @given(st.integers(0, len(data) - 1), st.integers(0, 7))
    @settings(max_examples=100, deadline=None)
    def flip(position: int, bit: int) -> None:
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        (folder / WEIGHTS).write_bytes(flipped)
        refused(folder)

    flip()


SMALL = safetensors.torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)})


@given(st.integers(0, 10**6), st.binary(max_size=12), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_what_is_read_is_what_safetensors_reads(position: int, inserted: bytes, removed: int) -> None:
    """A foreign file with any few bytes replaced is refused, or read as the format's own library reads it."""
    data = bytearray(SMALL)
    position %= len(data)
    data[position : position + removed] = inserted
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            mine = weights.read_safetensors(Path(file.name), check_size=int, seen=len).tensors
        except AdapterError:
            return
    theirs = safetensors.torch.load(bytes(data))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in mine)


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    folder = folders.foreign(tmp_path / "good")
    header_of, payload = folders.taken_apart((folder / WEIGHTS).read_bytes())
    text = json.dumps(header_of, separators=(",", ":")).encode()
    assert len(text) < length
    (folder / WEIGHTS).write_bytes(raw(text.ljust(length), payload))
    assert (folder / WEIGHTS).read_bytes().startswith(bytes([length % 256, length // 256]))
    assert lk.Adapter.load(folder) == folders.adapter()


@pytest.mark.parametrize("padding", range(4))
def test_a_payload_that_is_not_aligned_is_read(tmp_path: Path, padding: int) -> None:
    folder = folders.foreign(tmp_path / "good")
    fields, payload = folders.taken_apart((folder / WEIGHTS).read_bytes())
    text = json.dumps(fields).encode()
    (folder / WEIGHTS).write_bytes(raw(text + b" " * padding, payload))
    adapter = lk.Adapter.load(folder)
    assert adapter == folders.adapter()
    adapter.save(tmp_path / "again")
    assert lk.Adapter.load(tmp_path / "again").digest == adapter.digest


def test_a_large_file_is_read_whole(tmp_path: Path) -> None:
    made = folders.tensors() | {PREFIX + "score.weight": torch.randn(1_100, 1_000)}
    adapter = lk.Adapter(folders.config(modules_to_save=["score"]), made)
    again = lk.Adapter.load(adapter.save(tmp_path / "large"))
    assert (tmp_path / "large" / WEIGHTS).stat().st_size > read._HUGE_PAGES_FROM
    assert again == adapter
    again.saved()["score.weight"][0, 0] = 7  # memory of its own, not the file's
    assert lk.Adapter.load(tmp_path / "large") == adapter


@pytest.mark.parametrize("claims", ["nothing", "everything", "nothing, but with a record"])
def test_a_huge_sparse_file_is_refused_in_little_memory(tmp_path: Path, claims: str) -> None:
    folder, size = tmp_path / "sparse", 2**42
    if "record" in claims:
        folders.adapter().save(folder)
    else:
        folders.foreign(folder)
    if claims == "everything":
        entry = {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}
        (folder / WEIGHTS).write_bytes(raw({A0: entry}))
        size += (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size)
    kind = StorageError if claims == "everything" else AdapterError
    with in_little_memory(), pytest.raises(kind):
        lk.Adapter.load(folder)
    refused(folder, kind)


def test_a_file_that_memory_does_not_hold_is_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = folders.tensors() | {"large": torch.ones(2**20)}
    folder = folders.foreign(tmp_path / "big", values)
    monkeypatch.setattr(read, "available_memory", lambda: 1_000)
    told = refused(folder, StorageError)
    assert f"needs {sum(t.nbytes for t in values.values()):,} bytes of memory; 1,000 are available" in told


# What the tensors are


def changed(**values: Any) -> dict[str, torch.Tensor]:
    made = folders.tensors()
    made[A0] = made[A0].clone()
    return made | values


def test_a_value_that_is_not_finite_is_refused_with_its_tensor(tmp_path: Path) -> None:
    for number, value in enumerate([float("nan"), float("inf"), -float("inf")]):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            made = {key: tensor.to(dtype) for key, tensor in changed().items()}
            made[A0][3, 31] = value
            told = refused(folders.foreign(tmp_path / f"{number}{dtype}", made))
            assert f"{A0} holds NaN or infinity" in told
            assert B0 not in told


def test_opposite_infinities_do_not_cancel_and_large_values_are_no_infinity(tmp_path: Path) -> None:
    made = changed()
    made[A0][0, 0], made[A0][0, 1] = float("inf"), -float("inf")
    refused(folders.foreign(tmp_path / "both", made))
    made[A0][:] = 3e38
    assert lk.Adapter.load(folders.foreign(tmp_path / "large", made)).num_parameters
    wide = {key: tensor.double() for key, tensor in changed().items()}
    wide[A0][0, 0] = 1e300
    assert "NaN or infinity" in refused(folders.foreign(tmp_path / "wide", wide))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("key", [A0, B0, PREFIX + "score.weight"])
def test_whole_numbers_where_floats_belong_are_refused(tmp_path: Path, key: str, dtype: torch.dtype) -> None:
    made = folders.tensors() | {PREFIX + "score.weight": torch.ones(3, 32)}
    made[key] = torch.ones(made[key].shape, dtype=dtype)
    told = refused(folders.foreign(tmp_path / "whole", made, modules_to_save=["score"]))
    assert f"{key} has dtype {dtype}; a floating dtype is expected" in told


def test_every_misfit_is_in_one_error(tmp_path: Path) -> None:
    made = changed()
    made[A0] = made[A0].T.contiguous()
    made[A0.replace("layers.0", "layers.1")] = torch.randn(8, 32)
    made["stray"] = torch.zeros(1)
    made[PREFIX + "model.norm.weight"] = torch.full((3,), float("nan"))
    told = refused(folders.foreign(tmp_path / "many", made))
    assert f"{PATHS[0]}: the config says rank 4, the tensors are A (32, 4) and B (32, 4); A looks transposed" in told
    assert f"{PATHS[1]}: the config says rank 4, the tensors are A (8, 32) and B (32, 4)" in told
    assert "stray is not expected: keys begin with base_model.model." in told
    assert "model.norm.weight is not expected: neither LoRA weights nor in modules_to_save" in told
    assert "model.norm.weight holds NaN" in told


def without(*ends: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in folders.tensors().items() if not key.endswith(ends)}


@pytest.mark.parametrize(
    ("made", "fields", "told"),
    [
        (without("1.self_attn.q_proj.lora_B.weight"), {}, f"{PATHS[1]}: lora_B is missing"),
        (without(".lora_B.weight"), {}, f"{PATHS[0]}: lora_B is missing"),
        (without(".lora_A.weight"), {}, f"{PATHS[0]}: lora_A is missing"),
        ({}, {}, "holds no tensors"),
        (
            {key.removeprefix(PREFIX): t for key, t in folders.tensors().items()},
            {},
            "keys begin with base_model.model.",
        ),
        ({key.replace("base_model", "other"): t for key, t in folders.tensors().items()}, {}, "keys begin with"),
        (folders.tensors(rank=8), {}, "the config says rank 4"),
        (folders.tensors(), {"rank_pattern": {"layers.1.*": 2}}, f"{PATHS[1]}: the config says rank 2"),
        (folders.tensors(), {"use_dora": True}, "a magnitude is missing"),
        ({PREFIX + "score.weight": torch.ones(2, 2)}, {"modules_to_save": ["score"]}, "holds no LoRA weights"),
        (changed(**{A0: torch.randn(4)}), {}, "are not matrices"),
        (changed(**{A0: torch.randn(4, 2, 2, 2)}), {}, "are not matrices"),
        (changed(**{A0: torch.tensor(1.0)}), {}, "are not matrices"),
        (
            folders.tensors() | {PREFIX + PATHS[0] + ".lora_magnitude_vector": torch.ones(32)},
            {},
            "a magnitude is there",
        ),
        (
            folders.tensors()
            | {PREFIX + PATHS[0] + ".lora_embedding_A": torch.ones(4, 9)}
            | {PREFIX + PATHS[0] + ".lora_embedding_B": torch.ones(9, 4)},
            {},
            "a linear layer and for an embedding",
        ),
        (changed(**{PREFIX + "a\x1b[31m.lora_A.weight": torch.ones(4, 4)}), {}, "is not the name of a tensor"),
        (changed(**{PREFIX + "a" * 5_000 + ".lora_A.weight": torch.ones(4, 4)}), {}, "is not the name of a tensor"),
        (changed(**{"\u202e": torch.ones(4, 4)}), {}, "is not the name of a tensor"),
        (changed(**{f"stray.{number}": torch.ones(1) for number in range(500)}), {}, "and 300 more"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, made: dict[str, torch.Tensor], fields: dict[str, Any], told: str
) -> None:
    assert told in refused(folders.foreign(tmp_path / "unfit", made, **fields))


def test_extra_keys_are_ignored_on_request_only_and_named_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"{PREFIX}score.weight"
    folder = folders.foreign(tmp_path / "extra", folders.tensors() | {"stray": torch.ones(1), head: torch.ones(3, 32)})
    refused(folder)
    assert len(lk.Adapter.load(folder, allow={"extra-keys"}).pairs()) == 2
    assert f"these tensors are ignored, since the config does not mention them: {head}, stray" in caplog.text
    with pytest.raises(ConfigError, match="expected any of other-base"):
        lk.Adapter.load(folder, allow={"extra"})


def test_an_adapter_that_does_nothing_loads_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in folders.tensors().items()}
    lk.Adapter.load(folders.foreign(tmp_path / "zero", made))
    assert "every lora_B is zero: this adapter does nothing" in caplog.text


# Older files


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def old(folder: Path, value: Any, **how: Any) -> Path:
    folders.foreign(folder)
    (folder / WEIGHTS).unlink()
    torch.save(value, folder / OLD_WEIGHTS, **how)
    return folder


@pytest.mark.parametrize("legacy", [False, True])
def test_older_plain_tensors_load_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, legacy: bool
) -> None:
    folder = old(tmp_path / "old", folders.tensors(), _use_new_zipfile_serialization=not legacy)
    assert lk.Adapter.load(folder) == folders.adapter()
    assert f"reading plain tensors from {OLD_WEIGHTS}" in caplog.text


@pytest.mark.parametrize("name", [WEIGHTS, OLD_WEIGHTS])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_never_does(tmp_path: Path, name: str, legacy: bool) -> None:
    trace = tmp_path / "it ran"
    folder = old(tmp_path / "trap", {"a": Bomb(trace)}, _use_new_zipfile_serialization=not legacy)
    os.rename(folder / OLD_WEIGHTS, folder / name)
    refused(folder)
    assert not trace.exists()


def expanded() -> dict[str, torch.Tensor]:
    return {A0: torch.zeros(1).expand(2**40), B0: torch.zeros(1)}


@pytest.mark.parametrize(
    "value",
    [
        [torch.ones(1)],
        {"a": 1},
        {1: torch.ones(1)},
        {A0: torch.ones(2, 2).to_sparse()},
        {A0: torch.empty(2**40, device="meta")},
        expanded(),
        {A0: torch.ones(4, 32, dtype=torch.complex64), B0: torch.ones(32, 4)},
        {A0: torch.ones(4, 32).to(torch.float8_e4m3fn), B0: torch.ones(32, 4)},
    ],
    ids=["list", "number", "number as key", "sparse", "meta", "terabytes", "complex", "float8"],
)
def test_a_pickle_of_anything_but_plain_tensors_is_refused_in_little_memory(tmp_path: Path, value: Any) -> None:
    folder = old(tmp_path / "odd", value)
    with in_little_memory():
        refused(folder)


@pytest.mark.parametrize(
    "damage", [lambda d: d[:100], lambda d: b"", lambda d: b"\x80\x02.", lambda d: POINTER, bytes.swapcase]
)
def test_a_damaged_pickle_is_refused(tmp_path: Path, damage: Damage) -> None:
    folder = old(tmp_path / "broken", folders.tensors())
    (folder / OLD_WEIGHTS).write_bytes(damage((folder / OLD_WEIGHTS).read_bytes()))
    refused(folder)


def test_a_compressed_pickle_is_refused_before_it_is_blown_up(tmp_path: Path) -> None:
    folder = old(tmp_path / "bomb", {A0: torch.zeros(2**22)})
    packed = io.BytesIO()
    with zipfile.ZipFile(folder / OLD_WEIGHTS) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.namelist():
            target.writestr(item, source.read(item))
    (folder / OLD_WEIGHTS).write_bytes(packed.getvalue())
    with in_little_memory():
        assert "compressed" in refused(folder)


# What stands in the place of a file


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, RECORD, OLD_WEIGHTS])
@pytest.mark.parametrize("kind", ["link out", "dangling link", "link to itself", "fifo", "folder", "socket", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    folder = folders.adapter().save(tmp_path / "odd")
    outside = tmp_path / "outside"
    if name == OLD_WEIGHTS:
        (folder / WEIGHTS).unlink()
    else:
        os.rename(folder / name, outside)
    place(kind, folder / name, outside)
    began = time.perf_counter()
    refused(folder)
    assert time.perf_counter() - began < 60


def place(kind: str, path: Path, outside: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):
            made.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to({"link out": outside, "dangling link": "nowhere", "link to itself": path.name}[kind])


def test_a_link_inside_the_folder_and_a_link_to_the_folder_are_followed(tmp_path: Path) -> None:
    folder = folders.adapter().save(tmp_path / "real")
    os.rename(folder / WEIGHTS, folder / "blob")
    (folder / WEIGHTS).symlink_to("blob")
    (tmp_path / "link").symlink_to(folder)
    assert lk.Adapter.load(tmp_path / "link") == lk.Adapter.load(folder) == folders.adapter()


@pytest.mark.parametrize("below", [".", "adapters/x"])
def test_links_of_the_hubs_cache_are_followed(tmp_path: Path, below: str) -> None:
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "0123" / below
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, data in folders.contents(folders.adapter().save(tmp_path / "x")).items():
        (blobs / name).write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert lk.Adapter.load(snapshot) == folders.adapter()
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(tmp_path / "x" / WEIGHTS)
    with pytest.raises(AdapterError, match="leads out of its folder"):
        lk.Adapter.load(snapshot)


@pytest.mark.parametrize(
    "name", ["absent", "a file", "a file/below", "x" * 300, "y/" * 3_000, "nul\0", "bell\a", "loop"]
)
def test_a_path_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(AdapterError, match="is not a folder") as caught:
        lk.Adapter.load(tmp_path / name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    folder = folders.adapter().save(tmp_path / "torn")
    (folder / missing).unlink()
    assert missing in refused(folder, ConfigError if missing == CONFIG else AdapterError)


# The record


def test_a_torn_pair_is_seen(tmp_path: Path) -> None:
    one, two = folders.adapter(seed=1).save(tmp_path / "one"), folders.adapter(seed=2).save(tmp_path / "two")
    (one / WEIGHTS).write_bytes((two / WEIGHTS).read_bytes())
    assert "changed since it was saved" in refused(one)
    (one / CONFIG).write_text((one / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    refused(one)
    assert lk.Adapter.load(one, allow={"changed-files"}).config.lora_alpha == 9


def edited(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {**record, **changes}


def about(name: str, **changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: {**record, "files": {**record["files"], name: {**record["files"][name], **changes}}}


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda record: [record],
    "empty object": lambda record: {},
    "another format": edited(format=1),
    "a later format": edited(format=4),
    "format of another kind": edited(format="2"),
    "another digest": edited(digest="0" * 64),
    "digest of another kind": edited(digest=5),
    "no digest": lambda record: {key: value for key, value in record.items() if key != "digest"},
    "files of another kind": edited(files=[1, 2]),
    "no files": edited(files={}),
    "null files": edited(files=None),
    "a file of another kind": lambda record: {**record, "files": {WEIGHTS: "x", CONFIG: 5}},
    "another size": about(WEIGHTS, size=1),
    "size of another kind": about(WEIGHTS, size="2400"),
    "size null": about(WEIGHTS, size=None),
    "another sum of the weights": about(WEIGHTS, sha256="0" * 64),
    "another sum of the config": about(CONFIG, sha256="0" * 64),
    "sum of another kind": about(WEIGHTS, sha256=[1]),
    "base of another kind": edited(base="kit-base"),
    "metrics of another kind": edited(metrics=[1]),
    "recipe of another kind": edited(recipe="x"),
    "labels of another kind": edited(labels={"a": 1}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_record_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    folder = folders.adapter().save(tmp_path / "liar")
    record = json.loads((folder / RECORD).read_text())
    lie = LIES[name](record)
    (folder / RECORD).write_bytes(seal_record(lie) if isinstance(lie, dict) else json.dumps(lie).encode())
    assert RECORD in refused(folder) or "changed since" in refused(folder) or "are expected" in refused(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"format": 1, "format": 1}', b"\xff", b"[" * 100_000, b'{"seed": NaN}', b" " * (17 * 2**20)]
)
def test_a_damaged_record_is_refused(tmp_path: Path, text: bytes) -> None:
    folder = folders.adapter().save(tmp_path / "damaged")
    (folder / RECORD).write_bytes(text)
    assert RECORD in refused(folder)


def checked(folder: Path) -> int:
    return check_files(folder, dict(lk.Adapter.load(folder).record))


def test_one_flipped_bit_in_any_byte_of_any_file_is_seen(tmp_path: Path) -> None:
    chooser = random.Random(0)
    record = {"base": {"name": "b", "structure": "s"}, "metrics": {"loss": 1e-05, "é": 0.1}, "seed": 3}
    folder = folders.adapter().save(tmp_path / "x", record=record)
    for name, data in folders.contents(folder).items():
        for position in chooser.sample(range(len(data)), 150):
            flipped = bytearray(data)
            flipped[position] ^= 1 << chooser.randrange(8)
            (folder / name).write_bytes(flipped)
            with pytest.raises(LoraKitError):
                checked(folder)
        (folder / name).write_bytes(data)
    assert checked(folder) == 3


def test_a_record_of_format_2_loads_and_is_said_to_be_unprotected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders.adapter().save(tmp_path / "old")
    record = json.loads((folder / RECORD).read_text())
    del record["record_sha256"]
    (folder / RECORD).write_text(json.dumps({**record, "format": 2}))
    with caplog.at_level(logging.INFO):
        adapter = lk.Adapter.load(folder)
    assert "has format 2: a change of the record itself is not seen" in caplog.text
    again = adapter.save(tmp_path / "new")
    assert lk.Adapter.load(again).record["format"] == RECORD_FORMAT
    (folder / RECORD).write_text(json.dumps({**record, "format": RECORD_FORMAT}))
    assert "was changed since it was saved" in refused(folder)


def test_unknown_fields_of_a_record_and_a_changed_card_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folders.adapter().save(tmp_path / "x", record={"bcse": {"name": "kit-base"}, "seed": 1})
    (folder / CARD).write_text("edited")
    adapter = lk.Adapter.load(folder)
    assert "unknown fields are kept as they are: bcse" in caplog.text
    assert f"{CARD}: changed since it was saved" in caplog.text
    assert find_changed_files(folder, dict(adapter.record)) == {CARD: "changed"}
    (folder / CARD).unlink()
    with pytest.raises(VerificationError, match=f"{CARD} missing"):
        check_files(folder, dict(adapter.record))
    with pytest.raises(AdapterError, match="no file beside it"):
        find_changed_files(folder, {"files": {"../x/README.md": {}}})


def test_a_foreign_adapter_loads_and_what_cannot_be_checked_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        adapter = lk.Adapter.load(folders.foreign(tmp_path / "foreign"))
    assert adapter == folders.adapter()
    assert f"has no {RECORD}: neither its files nor the base it was made for can be checked" in caplog.text


# Writing


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    table, score = torch.randn(5, 32, dtype=torch.float16), torch.randn(3, 32, dtype=torch.bfloat16)
    made = folders.tensors() | {PREFIX + "score.weight": score, PREFIX + "score.table": table}
    made |= {PREFIX + "score.seen": torch.tensor(7), PREFIX + "score.mask": torch.tensor([True, False])}
    adapter = lk.Adapter(folders.config(modules_to_save=["score"]), made)
    folder = adapter.save(tmp_path / "x", record={"metrics": {"loss": 1.5, "bad": float("nan")}, "seed": 1})
    again = lk.Adapter.load(folder)
    assert again == adapter
    assert again.config == adapter.config
    assert all(
        torch.equal(tensor, made[key]) and tensor.dtype == made[key].dtype for key, tensor in again.tensors.items()
    )
    assert again.record["metrics"] == {"loss": 1.5, "bad": None}
    assert {
        name: hashlib.sha256(data).hexdigest() for name, data in folders.contents(folder).items() if name != RECORD
    } == {name: fact["sha256"] for name, fact in again.record["files"].items()}


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    shared = torch.nn.Parameter(torch.randn(8, 32))
    made = folders.tensors() | {PREFIX + "embed.weight": shared, PREFIX + "head.weight": shared[2:]}
    adapter = lk.Adapter(folders.config(modules_to_save=["embed", "head"]), made)
    assert lk.Adapter.load(adapter.save(tmp_path / "x")) == adapter


def every_dtype() -> dict[str, torch.Tensor]:
    """Values of every dtype that is read, with keys that JSON escapes, in an order that is not the canonical one."""
    made: dict[str, torch.Tensor] = {
        PREFIX + f"score.{dtype}": torch.ones(3, dtype=dtype) for dtype in weights.DTYPES.values()
    }
    odd = {PREFIX + f"score.{name}": torch.randn(2, 3) for name in ('quote"', "back\\slash", "色", "B", "a", "é")}
    return dict(reversed((folders.tensors() | odd | made | {PREFIX + "score.scalar": torch.tensor(7)}).items()))


def test_the_canonical_form_is_what_safetensors_writes() -> None:
    made = every_dtype()
    assert b"".join(weights.encode_safetensors(made)) == safetensors.torch.save(made, metadata={"format": "pt"})


def test_identity_is_of_the_tensors_and_not_of_the_file(tmp_path: Path) -> None:
    """The canonical file, whose sha256 is at hand when it is read, and files with the same tensors in other bytes."""
    config, made = folders.config(modules_to_save=["score"]), every_dtype()
    adapter = lk.Adapter(config, made)
    saved = adapter.save(tmp_path / "saved")
    assert lk.Adapter.load(saved).digest == adapter.digest
    header_of, payload = folders.taken_apart((saved / WEIGHTS).read_bytes())
    swapped = dict(sorted(header_of.items(), key=lambda item: item[0] == "__metadata__"))
    other_order, position = {}, 0
    for name, entry in reversed(swapped.items()):
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            other_order[name] = {**entry, "data_offsets": [position, position + end - begin]}
            position += end - begin
    others = {
        "spaces": raw(header_of, payload),
        "no metadata": raw({key: entry for key, entry in header_of.items() if key != "__metadata__"}, payload),
        "other order": raw(
            other_order, b"".join(payload[slice(*header_of[name]["data_offsets"])] for name in other_order)
        ),
    }
    for name, data in others.items():
        folder = adapter.save(tmp_path / name)
        (folder / WEIGHTS).write_bytes(data)
        record = json.loads((folder / RECORD).read_text())
        record["files"][WEIGHTS] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (folder / RECORD).write_bytes(seal_record(record))
        assert lk.Adapter.load(folder).digest == adapter.digest, name
        (folder / RECORD).unlink()
        assert lk.Adapter.load(folder).digest == adapter.digest, name


def test_bytes_that_read_as_the_same_bool_are_the_same_identity(tmp_path: Path) -> None:
    made = folders.tensors() | {PREFIX + "score.mask": torch.tensor([True, False])}
    folder = folders.foreign(tmp_path / "x", made, modules_to_save=["score"])
    data = (folder / WEIGHTS).read_bytes()
    assert data.endswith(b"\1\0")
    (folder / WEIGHTS).write_bytes(data[:-2] + b"\2\0")
    assert lk.Adapter.load(folder).digest == lk.Adapter(folders.config(modules_to_save=["score"]), made).digest


def test_the_identity_of_the_same_values_is_the_same_in_every_version() -> None:
    counted = {
        key: torch.arange(t.numel(), dtype=torch.float32).reshape(t.shape) for key, t in folders.tensors().items()
    }
    assert (
        lk.Adapter(folders.config(), counted).digest
        == "1f68164a5dab8aac0a93189fd23bb581c965685897ca7522f35be5fe4c935da4"
    )


def test_identity_is_the_value_of_the_numbers_and_the_order_of_the_patterns() -> None:
    digests = [
        lk.Adapter(folders.config(lora_alpha=alpha, rank_pattern=patterns), folders.tensors()).digest
        for alpha in (8, 8.0, 8.5)
        for patterns in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ]
    assert digests[:2] == digests[2:4]
    assert len(set(digests)) == 4


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, CARD, RECORD, "", "..", "../escape", "/etc/x", "a\0b"])
def test_further_files_cannot_take_the_place_of_others(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name"):
        folders.adapter().save(tmp_path / "x", files={name: b"x"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "record", [{"x": object()}, {"x": {1, 2}}, {"x": b"bytes"}, {"x": "a" * 2**24}, {1: 1, "a": 2}]
)
def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path: Path, record: Any) -> None:
    with pytest.raises(ConfigError, match=RECORD):
        folders.adapter().save(tmp_path / "x", record=record)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ünï-цвет-色", "a\nb", 'quote"`', "|pipe|", "sp ace", "\udcff", "-rf", "a" * 200])
def test_any_name_a_folder_can_have_is_saved_and_read(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    assert lk.Adapter.load(folders.adapter().save(folder)) == folders.adapter()
    card = (folder / CARD).read_text(encoding="utf-8")
    assert all(line.isprintable() for line in card.splitlines())
    assert os.listdir(tmp_path) == [name]


# Read while it changes


def rewritten_while_read(monkeypatch: pytest.MonkeyPatch, folder: Path, times: int) -> None:
    """Let every reading of the weights begin with a foreign writer that replaces config and weights in place."""
    real, left = AdapterFolder.read, iter(range(times))

    def read(self: AdapterFolder, **options: Any) -> Any:
        number = next(left, None)
        if number is not None:
            other = folders.foreign(
                folder.with_name(f"other-{number}"), folders.tensors(seed=number), lora_alpha=number + 1
            )
            for name in (CONFIG, WEIGHTS):
                (folder / name).write_bytes((other / name).read_bytes())
        return real(self, **options)

    monkeypatch.setattr(AdapterFolder, "read", read)


def test_a_foreign_folder_that_is_rewritten_while_it_is_read_gives_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders.foreign(tmp_path / "x")
    rewritten_while_read(monkeypatch, folder, 2)
    adapter = lk.Adapter.load(folder)
    assert adapter == lk.Adapter(folders.config(lora_alpha=2), folders.tensors(seed=1))


def test_a_folder_that_does_not_come_to_rest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders.foreign(tmp_path / "x")
    rewritten_while_read(monkeypatch, folder, 50)
    assert "was changed while it was read" in refused(folder)


def test_float64_tensors_are_said_to_be_rounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = folders.tensors()
    lk.Adapter.load(folders.foreign(tmp_path / "single", values))
    assert "its float64 tensors" not in caplog.text
    folder = folders.foreign(tmp_path / "double", {key: tensor.double() for key, tensor in values.items()})
    lk.Adapter.load(folder)
    assert "double: its float64 tensors are rounded to float32 where they are used" in caplog.text


@pytest.mark.parametrize("damaged", [0, 16, 31, None])
def test_values_are_checked_where_tensors_share_their_memory(damaged: int | None) -> None:
    """As those of a file do; what is not finite beside the tensors of an adapter is none of its values."""
    memory = torch.ones(34)
    memory[33] = math.nan
    config = lk.LoraConfig(r=2, target_modules=("layer",))
    whole = memory[:32].clone()
    for values in (whole, memory):
        if damaged is not None:
            values[damaged] = math.inf
        sides = {
            f"{PREFIX}layer.lora_A.weight": values[:16].view(2, 8),
            f"{PREFIX}layer.lora_B.weight": values[16:32].view(8, 2),
        }
        if damaged is None:
            lk.Adapter(config, sides)
        else:
            with pytest.raises(AdapterError, match=f"lora_{'AB'[damaged // 16]}.weight holds NaN or infinity"):
                lk.Adapter(config, sides)
