"""Writing the merged weights: one pass over the base, hashed while it is written, and read back from the disk.

A safetensors file is 8 bytes of header length, a JSON header and the tensors one after the other. So it is written by
blocks, and no tensor is ever whole in memory.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lora_kit.errors import MergeError, format_list
from lora_kit.io.safetensors import encode_header
from lora_kit.io.text import escape_text
from lora_kit.layers.fold import Retention
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.checkpoint.shards import INDEX, WEIGHTS
from lora_kit.merging.new_token_rows import TokenReplacement
from lora_kit.merging.planned_tensors import MergePlan, PlannedTensor
from lora_kit.merging.writing.fold_blocks import TensorFold, split_rows
from lora_kit.merging.writing.hashing_file import FileDigest, HashingFile
from lora_kit.merging.writing.journal import FinishedFiles
from lora_kit.torch_utils import is_finite

logger = logging.getLogger(__name__)

BytesProgress = Callable[[int, int], None]
"""Is called with the bytes written so far and the bytes in all."""

_PIECE_BYTES: Final = 8 * 2**20
_CAST_ELEMENTS: Final = 2**18
"""Values that are cast at once."""
_PARALLEL_READS: Final = 2
"""Files that are read back at once: reading one from the disk takes as long as hashing it."""


@dataclass
class WrittenFiles:
    """The weight files that were written.

    Attributes:
        files: size and sha256 of each, by name.
        retention: of each folded tensor.
        not_finite: names of tensors that have NaN or infinity in the base, and no adapter changes.
    """

    files: dict[str, FileDigest] = field(default_factory=dict)
    retention: list[Retention] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


def write_shards(
    plan: MergePlan, folder: Path, *, finished: FinishedFiles, progress: BytesProgress | None = None
) -> WrittenFiles:
    """Write the weight files of a plan, and an index unless there is one file of the usual name.

    While one file is written, the earlier ones are read back. A tensor that no adapter changes is copied as it is, and
    a warning names it where it is not finite.

    Args:
        plan: of the merge.
        folder: to write into.
        finished: files of the same plan that need not be written again.
        progress: see `BytesProgress`.

    Raises:
        MergeError: a tensor is not finite.
        VerificationError: a file was read back with other bytes than were written.
    """
    written, meter, buffers = WrittenFiles(), _ProgressMeter(plan.nbytes, progress), deque[Tensor]()
    with (
        _use_one_thread(),
        ThreadPoolExecutor(max_workers=1) as hashing,
        ThreadPoolExecutor(_PARALLEL_READS) as reading,
    ):
        checks: list[Future[None]] = []
        for shard, entries in plan.shards:
            result = finished.find(shard.name)
            if result is None:
                with (finished.folder / shard.name).open("xb", buffering=0) as file:
                    sink = HashingFile(file, hashing, buffers)
                    result = _write_file(sink, entries, shard.metadata, meter=meter, not_finite=written.not_finite)
                logger.info("%s: %d tensors, %d bytes", shard.name, len(entries), result[0]["size"])
                previous = checks[-1] if checks else None
                checks.append(reading.submit(finished.finish, shard.name, *result, after=previous))
            else:
                written.not_finite += _find_not_finite(entries)
                meter.advance(sum(entry.nbytes for entry in entries))
            written.files[shard.name] = result[0]
            written.retention += result[1]
        for check in checks:
            check.result()
    if written.not_finite:
        message = "the base has NaN or infinity, which the result has too, in %s: is its file damaged?"
        logger.warning(message, format_list([escape_text(name) for name in written.not_finite]))
    for name in written.files:
        os.rename(finished.folder / name, folder / name)
    if [shard.name for shard, _ in plan.shards] != [WEIGHTS]:
        (folder / INDEX).write_bytes(_build_index(plan))
    return written


@contextmanager
def _use_one_thread() -> Iterator[None]:
    """Run torch on one thread: a block is too small to share, and the other cores hash and write."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _ProgressMeter:
    """Counts the bytes that were written, and reports them."""

    def __init__(self, total: int, progress: BytesProgress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _write_file(
    sink: HashingFile,
    entries: Sequence[PlannedTensor],
    metadata: Mapping[str, str],
    *,
    meter: _ProgressMeter,
    not_finite: list[str],
) -> tuple[FileDigest, list[Retention]]:
    """Write one file. Returns its size and sha256, and what survived of the deltas in it; see `WrittenFiles`."""
    retention: list[Retention] = []
    stored = ((name, dtype, shape) for entry in entries for name, (dtype, shape) in entry.stored.items())
    sink.put(memoryview(encode_header(stored, metadata)))
    for count in _put_tensors(entries, sink, retention, not_finite):
        meter.advance(count)
    return sink.finish(), retention


def _put_tensors(
    entries: Sequence[PlannedTensor], sink: HashingFile, retention: list[Retention], not_finite: list[str]
) -> Iterator[int]:
    """Put the bytes of tensors into a file, one after the other; yield how many each time."""
    for entry in entries:
        if entry.how == "requantized":
            fold = TensorFold(entry)
            parts = fold.requantize().parts
            yield from _put_pieces((_view_bytes(parts[name]) for name in entry.stored), sink)
            retention.append(fold.retention)
        elif entry.rows is not None:
            replacement = TokenReplacement(entry)
            yield from replacement.write_into(sink.reserve)
            retention.append(replacement.retention)
        elif entry.updates:
            fold = TensorFold(entry)
            yield from fold.write_into(sink.reserve)
            retention.append(fold.retention)
        else:
            finite = yield from _put_unchanged(entry, sink)
            not_finite += [] if finite else [entry.name]


def _put_unchanged(entry: PlannedTensor, sink: HashingFile) -> Generator[int, None, bool]:
    """Put a tensor that no adapter changes, cast where the plan says so. Returns whether its values are finite.

    Raises:
        MergeError: a finite value is not finite in the dtype of the result.
    """
    finite = True
    if isinstance(entry.source, Tensor) and entry.dtype == entry.source.dtype and entry.source.is_contiguous():
        for part in entry.source.reshape(-1).split(_PIECE_BYTES // entry.dtype.itemsize):
            finite = is_finite(part) and finite
            yield from _put_pieces([_view_bytes(part)], sink)
        return finite
    for part in _split_for_cast(entry.source):
        target = sink.reserve(part.numel(), entry.dtype).view(part.shape).copy_(part)
        is_overflow = not is_finite(target) and is_finite(part)
        if is_overflow:
            message = f"{escape_text(entry.name)} has values that are not finite in {entry.dtype}"
            raise MergeError(message, hint="merge with dtype bfloat16 or float32, whose range is larger")
        finite = is_finite(part) and finite
        yield part.numel() * entry.dtype.itemsize
    return finite


def _find_not_finite(entries: Sequence[PlannedTensor]) -> Iterator[str]:
    """Yield the names of tensors that no adapter changes and that are not finite."""
    for entry in entries:
        unchanged = entry.how != "requantized" and entry.rows is None and not entry.updates
        if unchanged and not all(map(is_finite, _split_for_cast(entry.source))):
            yield entry.name


def _put_pieces(pieces: Iterable[memoryview], sink: HashingFile) -> Iterator[int]:
    for piece in pieces:
        sink.put(piece)
        yield piece.nbytes


def _split_for_cast(tensor: Tensor | QuantizedWeight) -> Iterator[Tensor]:
    """Yield a tensor in parts small enough to cast, in the order of its values."""
    if isinstance(tensor, QuantizedWeight):
        yield from (tensor[rows] for rows in split_rows(*tensor.shape, multiple=tensor.step))
    elif tensor.is_contiguous():
        yield from tensor.reshape(-1).split(_CAST_ELEMENTS)
    elif tensor.ndim < 2 or tensor.numel() <= _CAST_ELEMENTS:
        yield tensor
    else:
        for part in tensor:
            yield from _split_for_cast(part)


def _view_bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return data


def _build_index(plan: MergePlan) -> bytes:
    """Return the bytes of `model.safetensors.index.json`."""
    weight_map = {name: shard.name for shard, entries in plan.shards for entry in entries for name in entry.stored}
    fields = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(fields, indent=2) + "\n").encode()
