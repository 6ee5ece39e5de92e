"""One flipped bit of a file that vouches for itself is seen; `python -m tests.faults.flips` flips one in every byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

import pytest

from lora_kit.training.loop.checkpoints import RunFolder
from tests.faults import flips
from tests.support import folders

EVERY = 97
"""Bytes from one that is flipped to the next; a prime, so that it meets fields of any length."""

Write = Callable[[str], flips.Artifact]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """What writes an artifact, once for the tests here."""
    return cache(lambda name: flips.ARTIFACTS[name](tmp_path_factory.mktemp("artifact")))


@pytest.mark.parametrize("name", flips.ARTIFACTS)
def test_one_flipped_bit_is_seen(write: Write, name: str) -> None:
    counts = flips.flip_bits(name, write(name), every=EVERY)
    assert counts.unseen == []
    assert counts.flips > 5


def test_a_flip_that_nobody_would_see_is_found(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write("record of a merge")
    monkeypatch.setattr("lora_kit.merging.preflight.is_intact", lambda *given: True)
    assert flips.flip_bits("record of a merge", artifact, every=EVERY).unseen != []


def test_what_goes_on_from_a_checkpoint_sees_what_its_reader_sees(write: Write) -> None:
    """The long form asks the reader alone: the search for a checkpoint to go on from takes none that it rejects."""
    folder, _ = write("checkpoint")
    runs, chance = RunFolder(folder.parent.with_name("out")), random.Random(1)
    assert runs.list_complete() != []
    for file, data in folders.contents(folder).items():
        flipped = bytearray(data)
        flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (folder / file).write_bytes(flipped)
        assert runs.list_complete() == [], file
        (folder / file).write_bytes(data)
    assert runs.list_complete() != []
