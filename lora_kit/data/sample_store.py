"""Samples on the disk, mapped into memory: what is read of them is in memory, and may leave it again.

    samples/
        ids.i32  labels.i32  offsets.i64  label_offsets.i64     the tensors of an `EncodedDataset`, little-endian
        samples.json                                            what they were made from, their sizes and counts

The folder is written whole or not at all. Samples that were made from something else are not read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Final

import torch
from torch import Tensor

from lora_kit.data.batches import EncodedDataset
from lora_kit.data.encode import RowCounts
from lora_kit.errors import AdapterError
from lora_kit.io.atomic_write import stage_folder
from lora_kit.io.output_lock import remove_folder
from lora_kit.io.read import exists, read_json
from lora_kit.io.strict_json import JsonObject

INDEX: Final = "samples.json"
_FORMAT: Final = 1
_INDEX_LIMIT: Final = 2**20
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "ids": torch.int32,
    "labels": torch.int32,
    "offsets": torch.int64,
    "label_offsets": torch.int64,
}
_SUFFIXES: Final = {torch.int32: ".i32", torch.int64: ".i64"}


def write_samples(
    folder: Path, parts: Iterable[tuple[EncodedDataset, RowCounts]], *, made_from: Mapping[str, object]
) -> None:
    """Write samples to a folder part by part, all or nothing; only one part is in memory.

    Args:
        parts: samples of one kind without weights and types of tokens, with the counts of their rows.
        made_from: everything that decides the samples, as JSON values.

    Raises:
        StorageError: the folder cannot be written.
    """
    assert sys.byteorder == "little"
    with stage_folder(folder, replace=True, owned=_is_own) as staging:
        files = {name: (staging / _name_file(name)).open("wb") for name in _DTYPES}
        try:
            kind, counts, sizes = _append_parts(files, parts)
        finally:
            for file in files.values():
                file.close()
        index = {"format": _FORMAT, "made_from": made_from, "kind": kind, "sizes": sizes, "rows": asdict(counts)}
        (staging / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _append_parts(
    files: Mapping[str, BinaryIO], parts: Iterable[tuple[EncodedDataset, RowCounts]]
) -> tuple[str, RowCounts, dict[str, int]]:
    """Write the tensors of all parts; return the kind of the samples, the counts of all rows, and items by tensor."""
    kind, counts = "", RowCounts()
    sizes = {"ids": 0, "labels": 0, "offsets": 1, "label_offsets": 1}
    for name in ("offsets", "label_offsets"):
        _append(files[name], torch.zeros(1, dtype=torch.int64))
    for samples, part_counts in parts:
        assert samples.weights is None
        assert samples.types is None
        kind, counts = samples.kind, counts + part_counts
        tensors = {
            "offsets": samples.offsets[1:] + sizes["ids"],
            "label_offsets": samples.label_offsets[1:] + sizes["labels"],
            "ids": samples.ids,
            "labels": samples.labels,
        }
        for name, tensor in tensors.items():
            _append(files[name], tensor)
            sizes[name] += len(tensor)
    return kind, counts, sizes


def _append(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().numpy().data)


def read_samples(folder: Path, *, made_from: Mapping[str, object]) -> tuple[EncodedDataset, RowCounts] | None:
    """Map the samples of a folder into memory.

    Args:
        made_from: what they must have been made from.

    Returns:
        The samples and the counts of their rows; None where there are none, or other ones.
    """
    index = _read_index(folder)
    if index is None or index.get("made_from") != json.loads(json.dumps(made_from)):
        return None
    sizes = index["sizes"]
    paths = {name: folder / _name_file(name) for name in _DTYPES}
    is_whole = all(
        path.is_file() and path.stat().st_size == sizes[name] * _DTYPES[name].itemsize for name, path in paths.items()
    )
    if not is_whole:
        return None
    tensors = {name: _map_tensor(path, sizes[name], _DTYPES[name]) for name, path in paths.items()}
    return EncodedDataset(kind=index["kind"], **tensors), RowCounts(**index["rows"])


def _map_tensor(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    if not size:
        return torch.empty(0, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)


def remove_samples(folder: Path) -> None:
    """Remove a folder of samples, if it is one; samples that are mapped stay as they are."""
    if _is_own(folder):
        remove_folder(folder, last=[INDEX])


def _name_file(name: str) -> str:
    return name + _SUFFIXES[_DTYPES[name]]


def _is_own(folder: Path) -> bool:
    return _read_index(folder) is not None


def _read_index(folder: Path) -> JsonObject | None:
    if not exists(folder / INDEX):
        return None
    try:
        index = read_json(folder / INDEX, limit=_INDEX_LIMIT)
    except AdapterError:
        return None
    return index if index.get("format") == _FORMAT else None
