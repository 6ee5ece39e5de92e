"""The weight files of a base: their tensors mapped into memory, where they take none until they are read."""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.errors import AdapterError, BaseModelError, format_list
from lora_kit.io.read import exists, open_regular_file, read_json, refuse_lfs_pointer
from lora_kit.io.text import escape_text
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight, find_quantized_weights

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_FILE_FORMATS: Final = ((WEIGHTS, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_INDEX_LIMIT: Final = 256 * 2**20
_FILE_NAME: Final = re.compile(r"[\w.-]+\.(safetensors|bin)")
_SHARD_NAME: Final = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


@dataclass(frozen=True)
class Shard:
    """One weight file.

    Attributes:
        name: of the file, in the form it is written again: always safetensors.
        tensors: mapped, by name, in the order of their bytes; not to be written to.
        metadata: of a safetensors file.
        packed: quantised weights, of which `tensors` has the shape alone; see `unpacked`.
    """

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    packed: Mapping[str, QuantizedWeight] = field(default_factory=dict)


def read_shards(folder: Path) -> tuple[Shard, ...]:
    """The weight files of a model folder, checked against each other; no weight is read.

    Raises:
        BaseModelError: there are none; one is missing, damaged, or not what the index says; says which.
    """
    for single, index in _FILE_FORMATS:
        if exists(folder / single):
            return (_read_shard(folder / single),)
        if exists(folder / index):
            return _read_indexed(folder, index)
    raise BaseModelError(
        f"{escape_text(folder)} has no weights", hint=f"expected: {WEIGHTS}, or {INDEX} and its shards"
    )


def group_quantized_weights(shards: Sequence[Shard], dtype: torch.dtype) -> tuple[Shard, ...]:
    """The same files as those of a model that is not quantised: what a weight is stored in counts as the weight.

    Args:
        dtype: of the model.

    Raises:
        BaseModelError: a quantised weight is damaged.
    """
    packed = find_quantized_weights({name: tensor for shard in shards for name, tensor in shard.tensors.items()}, dtype)
    parts = {part for one in packed.values() for part in one.parts}
    found = []
    for shard in shards:
        own = {name: one for name, one in packed.items() if name in shard.tensors}
        rest = {name: tensor for name, tensor in shard.tensors.items() if name in own or name not in parts}
        found.append(replace(shard, tensors={**rest, **{name: one.to_meta() for name, one in own.items()}}, packed=own))
    return tuple(found)


def _read_indexed(folder: Path, index: str) -> tuple[Shard, ...]:
    """The shards that an index lists, in the order of their names."""
    places = _read_weight_map(folder / index)
    _refuse_unlisted(folder, index, set(places.values()))
    shards = []
    for file in sorted(set(places.values())):
        shard = _read_shard(folder / file)
        promised = {name for name, place in places.items() if place == file}
        if promised != shard.tensors.keys():
            other = format_list(sorted(promised ^ shard.tensors.keys()))
            raise BaseModelError(f"{escape_text(folder / file)} and {index} disagree: {other}", hint="a shard is torn")
        shards.append(shard)
    return tuple(shards)


def _refuse_unlisted(folder: Path, index: str, files: Collection[str]) -> None:
    """Raise BaseModelError for a file that is called as shards are, and that the index does not know.

    Weights under other names (`consolidated.safetensors`) are the same ones for other programs.
    """
    more = sorted(file.name for file in folder.iterdir() if _SHARD_NAME.fullmatch(file.name) and file.name not in files)
    more = [name for name in more if name.endswith(Path(min(files)).suffix)]
    if more:
        raise BaseModelError(
            f"{escape_text(folder)}: {index} does not know the shard {escape_text(format_list(more))}",
            hint="remove it, or fetch the whole base again",
        )


def _read_weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, as an index says."""
    with _raise_as_base_error():
        places = read_json(index, limit=_INDEX_LIMIT).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BaseModelError(f"{escape_text(index)} has no weight_map", hint="the index is damaged")
    for name, file in places.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise BaseModelError(
                f"{escape_text(index)}: {escape_text(name)} is in {escape_text(file)}, which is not a shard"
            )
    return places


def _read_shard(file: Path) -> Shard:
    with _raise_as_base_error(), open_regular_file(file) as (handle, _):
        refuse_lfs_pointer(handle.read(64), escape_text(file))
    return _load_pickle(file) if file.suffix == ".bin" else _map_safetensors(file)


def _map_safetensors(file: Path) -> Shard:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.offset_keys()}
            metadata = dict(reader.metadata() or {})
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"{escape_text(file)}: damaged: {_first_line_of(error)}") from None
    return Shard(file.name, tensors, {"format": "pt", **metadata})


def _load_pickle(file: Path) -> Shard:
    """A shard in PyTorch's older form: plain tensors only, never code."""
    # Those from before PyTorch 1.6 are no zip files, and cannot be mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # damaged pickles fail in every way there is
        raise BaseModelError(
            f"{escape_text(file)}: not a file of plain tensors; it may carry code and is not read: "
            f"{_first_line_of(error)}",
            hint="save it as safetensors",
        ) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in found.items()):
        raise BaseModelError(f"{escape_text(file)}: a mapping of names to plain tensors was expected")
    name = re.sub(r"^pytorch_model", "model", file.stem) + ".safetensors"
    return Shard(name, {key: tensor.detach() for key, tensor in found.items()}, {"format": "pt"})


def _is_plain(tensor: Any) -> bool:
    """Whether a value is a dense tensor that owns as many bytes as it shows; a stride of 0 makes terabytes of a few."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


@contextlib.contextmanager
def _raise_as_base_error() -> Iterator[None]:
    """What is wrong with a file is wrong with the base."""
    try:
        yield
    except AdapterError as error:
        raise BaseModelError(error.message, hint=error.hint) from None


def _first_line_of(error: Exception) -> str:
    return escape_text((str(error).splitlines() or [type(error).__name__])[0])
