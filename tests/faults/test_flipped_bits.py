"""One flipped bit in a byte of a file that vouches for itself is seen; in every byte with LORA_KIT_LONG=1."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_kit as lk
from lora_kit.adapter.adapter_record import check_files
from lora_kit.errors import LoraKitError
from lora_kit.merging.merge import merge
from lora_kit.merging.preflight import MERGE_RECORD, read_merged_digests
from lora_kit.training.loop.checkpoints import RunFolder
from tests.support import folders, merging, tiny
from tests.support.interrupted import die_at, killed, long_recipe

EVERY = 1 if os.environ.get("LORA_KIT_LONG") == "1" else 97
"""Bytes from one that is flipped to the next; a prime, so that it meets fields of any length."""


def save_adapter(folder: Path) -> tuple[Path, Callable[[], object]]:
    saved = folders.adapter().save(folder / "adapter", record={"base": {"name": "b", "structure": "s"}, "seed": 3})
    return saved, lambda: check_files(saved, dict(lk.Adapter.load(saved).record))


def write_checkpoint(folder: Path) -> tuple[Path, Callable[[], object]]:
    killed(long_recipe(folder, steps=3), die_at(3))
    runs = RunFolder(folder / "out")
    return runs.path(2), lambda: runs.read(2)


def write_merge(folder: Path) -> tuple[Path, Callable[[], object]]:
    """The record alone: other files of a model folder are for other programs, and it has their digests."""
    base = merging.base_folder(folder / "base", tiny.llama())
    merge(base, folders.adapter(), folder / "merged")
    (folder / "record").mkdir()
    os.rename(folder / "merged" / MERGE_RECORD, folder / "record" / MERGE_RECORD)
    return folder / "record", lambda: read_merged_digests(folder / "record")


ARTIFACTS = {"adapter": save_adapter, "checkpoint": write_checkpoint, "record of a merge": write_merge}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_one_flipped_bit_is_seen(tmp_path: Path, name: str) -> None:
    artifact, read = ARTIFACTS[name](tmp_path)
    read()
    chance, flips = random.Random(0), 0
    unseen: list[str] = []
    for file, data in folders.contents(artifact).items():
        for position in range(chance.randrange(EVERY), len(data), EVERY):
            flipped = bytearray(data)
            flipped[position] ^= 1 << chance.randrange(8)
            (artifact / file).write_bytes(flipped)
            flips += 1
            try:
                read()
            except LoraKitError:
                continue
            unseen.append(f"{file}:{position}")
        (artifact / file).write_bytes(data)
    read()
    assert unseen == []
    assert flips > 5
