"""`python -m tests.faults.flips [--write]`: one random bit is flipped in every byte of every file of what is saved.

A flip that no reader sees is printed, and the exit status is 1 if there is one. What reads an artifact is what every
use of it passes through: `Adapter.load` with `verify`, the reading of a checkpoint that a training resumes from, the
reading of the record by the next merge.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import lora_kit as lk
from benchmarks import harness
from lora_kit.adapter.adapter_record import check_files
from lora_kit.errors import LoraKitError
from lora_kit.merging.merge import merge
from lora_kit.merging.preflight import MERGE_RECORD, read_merged_digests
from lora_kit.training.loop.checkpoints import RunFolder
from tests.faults import reliability_page
from tests.faults.quiet import hush
from tests.support import folders, merging, tiny
from tests.support.interrupted import die_at, killed, long_recipe

RESULT: Final = harness.RESULTS / "flips.json"
Artifact = tuple[Path, Callable[[], object]]
"""A folder, and what reads it and raises where a file is not as it was written."""


@dataclass
class FlipCounts:
    """What came of flipping bits of one artifact.

    Attributes:
        artifact: its name.
        files: how many it has.
        bytes: of all of them.
        flips: bits that were flipped, one at a time.
        unseen: flips that the reader did not see, as `file:position:bit`.
    """

    artifact: str
    files: int = 0
    bytes: int = 0
    flips: int = 0
    unseen: list[str] = field(default_factory=list)


def save_adapter(folder: Path) -> Artifact:
    """Save an adapter with a record of its base."""
    saved = folders.adapter().save(folder / "adapter", record={"base": {"name": "b", "structure": "s"}, "seed": 3})
    return saved, lambda: check_files(saved, dict(lk.Adapter.load(saved).record))


def write_checkpoint(folder: Path) -> Artifact:
    """Kill a training after its checkpoint of step 2."""
    killed(long_recipe(folder, steps=3, lora={"r": 1, "target_modules": ["q_proj"]}), die_at(3))
    runs = RunFolder(folder / "out")
    return runs.path(2), lambda: runs.read(2)


def write_merge(folder: Path) -> Artifact:
    """The record alone: other files of a model folder are for other programs, and it has their digests."""
    base = merging.base_folder(folder / "base", tiny.llama())
    merge(base, folders.adapter(), folder / "merged")
    (folder / "record").mkdir()
    os.rename(folder / "merged" / MERGE_RECORD, folder / "record" / MERGE_RECORD)
    return folder / "record", lambda: read_merged_digests(folder / "record")


ARTIFACTS: Final = {"adapter": save_adapter, "checkpoint": write_checkpoint, "record of a merge": write_merge}


def flip_bits(name: str, artifact: Artifact, *, every: int = 1, seed: int = 0) -> FlipCounts:
    """Flip one bit in each byte, or in one of so many, of every file of an artifact; read it after each flip."""
    folder, read = artifact
    read()
    contents, counts = folders.contents(folder), FlipCounts(name)
    counts.files, counts.bytes = len(contents), sum(map(len, contents.values()))
    for file, position, bit in _choose_bits(contents, every, random.Random(seed)):
        with open(folder / file, "r+b", buffering=0) as stream:
            _write_byte(stream.fileno(), position, contents[file][position] ^ (1 << bit))
            counts.flips += 1
            try:
                read()
                counts.unseen.append(f"{file}:{position}:{bit}")
            except LoraKitError:
                pass
            _write_byte(stream.fileno(), position, contents[file][position])
    read()
    return counts


def _choose_bits(contents: dict[str, bytes], every: int, chance: random.Random) -> Iterator[tuple[str, int, int]]:
    for file, data in contents.items():
        for position in range(chance.randrange(every), len(data), every):
            yield file, position, chance.randrange(8)


def _write_byte(descriptor: int, position: int, value: int) -> None:
    os.pwrite(descriptor, bytes([value]), position)


def main() -> int:
    """Flip bits of the artifacts that are named, or of all, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.flips", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ARTIFACTS), default=list(ARTIFACTS), help="artifacts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the counts, and the table of docs/reliability.md")
    arguments = parser.parse_args()
    hush()
    logging.getLogger("lora_kit").setLevel(logging.ERROR)
    found = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="flips-") as folder:
            counts = flip_bits(name, ARTIFACTS[name](Path(folder)), seed=arguments.seed)
        print(f"{name}: {counts.flips:,} bits in {counts.files} files, {len(counts.unseen)} unseen", flush=True)
        print("".join(f"  UNSEEN {place}\n" for place in counts.unseen[:20]), end="", flush=True)
        found.append(counts)
    if arguments.write:
        result = {**harness.environment(), "artifacts": [asdict(counts) for counts in found]}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        reliability_page.fill()
    return 1 if any(counts.unseen for counts in found) else 0


if __name__ == "__main__":
    sys.exit(main())
