"""Writing the merged weights: one pass over the base, hashed on the way out, and read back from the disk.

A safetensors file is 8 bytes of header length, a JSON header and the tensors one after the other, so it is written as
they come: no tensor is ever whole in memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.io.safetensors import DTYPES
from lora_kit.layers.fold import Retention
from lora_kit.merging.checkpoint.bnb_weights import Packed
from lora_kit.merging.checkpoint.shards import INDEX, WEIGHTS
from lora_kit.merging.new_token_rows import Replacement
from lora_kit.merging.planned_tensors import Entry, Plan
from lora_kit.merging.writing.fold_blocks import Fold, blocks
from lora_kit.merging.writing.hashing_file import Facts, Sink
from lora_kit.merging.writing.journal import Kept

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Is given the bytes written so far, and how many there will be."""

_PIECE: Final = 8 * 2**20
_PART: Final = 2**18
"""Numbers that are cast at once."""
_READERS: Final = 2
"""Files that are read back at once: each waits for the disk as long as it takes to hash."""
_NAMES: Final[dict[torch.dtype, str]] = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}


@dataclass
class Written:
    """What was written.

    Attributes:
        files: size and sha256 of each file, by its name.
        retention: of each folded tensor.
    """

    files: dict[str, Facts] = field(default_factory=dict)
    retention: list[Retention] = field(default_factory=list)


def write(plan: Plan, folder: Path, *, kept: Kept, progress: Progress | None = None) -> Written:
    """Write the weight files of a plan, and their index where they are not one of the usual name.

    While one file is written, those before it are read back.

    Args:
        kept: finished files of the same plan; they are not written again.

    Raises:
        MergeError: a tensor is not finite. VerificationError: what was read back is not what was written.
    """
    written, meter, slabs = Written(), _Meter(plan.nbytes, progress), deque[Tensor]()
    with _one_thread(), ThreadPoolExecutor(max_workers=1) as hashing, ThreadPoolExecutor(_READERS) as reading:
        checks: list[Future[None]] = []
        for shard, entries in plan.shards:
            found = kept.finished(shard.name)
            if found is None:
                with (kept.folder / shard.name).open("xb", buffering=0) as file:
                    found = _write_file(Sink(file, hashing, slabs), entries, shard.metadata, meter=meter)
                logger.info("%s: %d tensors, %d bytes", shard.name, len(entries), found[0]["size"])
                checks.append(reading.submit(kept.finish, shard.name, *found, after=checks[-1] if checks else None))
            else:
                meter.advance(sum(entry.nbytes for entry in entries))
            written.files[shard.name] = found[0]
            written.retention += found[1]
        for check in checks:
            check.result()
    for name in written.files:
        os.rename(kept.folder / name, folder / name)
    if [shard.name for shard, _ in plan.shards] != [WEIGHTS]:
        (folder / INDEX).write_bytes(_index(plan))
    return written


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one thread: a block is too small to share, and the other cores hash and write."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Meter:
    """How far a merge is."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _write_file(
    sink: Sink, entries: Sequence[Entry], metadata: Mapping[str, str], *, meter: _Meter
) -> tuple[Facts, list[Retention]]:
    """Write one file; returns its size and sha256, and what became of the deltas in it."""
    retention: list[Retention] = []
    sink.put(memoryview(_header(entries, metadata)))
    for count in _put(entries, sink, retention):
        meter.advance(count)
    return sink.finish(), retention


def _put(entries: Sequence[Entry], sink: Sink, retention: list[Retention]) -> Iterator[int]:
    """Hand over the bytes of tensors, one after the other; how many each time."""
    for entry in entries:
        source = entry.source
        if entry.how == "requantized":
            fold = Fold(entry)
            again = fold.packed().parts
            yield from _put_whole((_bytes(again[name]) for name in entry.stored), sink)
            retention.append(fold.retention)
        elif entry.rows is not None:
            replacement = Replacement(entry)
            yield from replacement.into(sink.room)
            retention.append(replacement.retention)
        elif entry.updates:
            fold = Fold(entry)
            yield from fold.into(sink.room)
            retention.append(fold.retention)
        elif isinstance(source, Tensor) and entry.dtype == source.dtype and source.is_contiguous():
            whole = _bytes(source)
            yield from _put_whole((whole[start : start + _PIECE] for start in range(0, whole.nbytes, _PIECE)), sink)
        else:
            for part in _small(source):
                sink.room(part.numel(), entry.dtype).view(part.shape).copy_(part)
                yield part.numel() * entry.dtype.itemsize


def _put_whole(pieces: Iterable[memoryview], sink: Sink) -> Iterator[int]:
    for piece in pieces:
        sink.put(piece)
        yield piece.nbytes


def _small(tensor: Tensor | Packed) -> Iterator[Tensor]:
    """A tensor in parts that are soon cast, in the order of its numbers."""
    if isinstance(tensor, Packed):
        yield from (tensor[rows] for rows in blocks(*tensor.shape, multiple=tensor.step))
    elif tensor.is_contiguous():
        yield from tensor.reshape(-1).split(_PART)
    elif tensor.ndim < 2 or tensor.numel() <= _PART:
        yield tensor
    else:
        for part in tensor:
            yield from _small(part)


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return data


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file, padded to 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in (item for entry in entries for item in entry.stored.items()):
        begin, end = end, end + shape.numel() * dtype.itemsize
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(plan: Plan) -> bytes:
    """`model.safetensors.index.json`."""
    places = {name: shard.name for shard, entries in plan.shards for entry in entries for name in entry.stored}
    fields = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(fields, indent=2) + "\n").encode()
