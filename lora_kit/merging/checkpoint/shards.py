"""The weight files of a base, mapped into memory: a tensor takes memory only once it is read."""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

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
        name: of the file that a merge writes from it: always safetensors.
        tensors: mapped, by name, in the order of their bytes; read-only.
        metadata: of a safetensors file.
        packed: quantized weights, by name; `tensors` has meta tensors for them, see `group_quantized_weights`.
    """

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    packed: Mapping[str, QuantizedWeight] = field(default_factory=dict)


def read_shards(folder: Path) -> tuple[Shard, ...]:
    """Return the weight files of a model folder, checked against each other; no weight is read.

    Raises:
        BaseModelError: the folder has no weight file, or one is missing, damaged or not what the index says.
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
    """Return the files as if the model were unquantized: the stored parts of a quantized weight become one tensor.

    Args:
        shards: of a quantized model.
        dtype: of the model.

    Raises:
        BaseModelError: a quantized weight is damaged.
    """
    packed = find_quantized_weights({name: tensor for shard in shards for name, tensor in shard.tensors.items()}, dtype)
    parts = {part for one in packed.values() for part in one.parts}
    grouped = []
    for shard in shards:
        own = {name: one for name, one in packed.items() if name in shard.tensors}
        rest = {name: tensor for name, tensor in shard.tensors.items() if name in own or name not in parts}
        grouped.append(
            replace(shard, tensors={**rest, **{name: one.to_meta() for name, one in own.items()}}, packed=own)
        )
    return tuple(grouped)


def _read_indexed(folder: Path, index: str) -> tuple[Shard, ...]:
    """Return the shards that an index lists, sorted by name."""
    files = _read_weight_map(folder / index)
    _refuse_unlisted(folder, index, set(files.values()))
    shards = []
    for file in sorted(set(files.values())):
        shard = _read_shard(folder / file)
        listed = {name for name, place in files.items() if place == file}
        if listed != shard.tensors.keys():
            other = format_list(sorted(listed ^ shard.tensors.keys()))
            raise BaseModelError(
                f"{escape_text(folder / file)} and {index} disagree: {other}",
                hint="a shard is damaged; fetch the base again",
            )
        shards.append(shard)
    return tuple(shards)


def _refuse_unlisted(folder: Path, index: str, files: Collection[str]) -> None:
    """Raise BaseModelError for a file that is named like a shard and that the index does not list.

    Weights under other names (`consolidated.safetensors`) are copies for other programs.
    """
    shards = sorted(file.name for file in folder.iterdir() if _SHARD_NAME.fullmatch(file.name))
    unlisted = [name for name in shards if name not in files and name.endswith(Path(min(files)).suffix)]
    if unlisted:
        raise BaseModelError(
            f"{escape_text(folder)}: {index} does not know the shard {escape_text(format_list(unlisted))}",
            hint="remove it, or fetch the whole base again",
        )


def _read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor, by the index."""
    with _raise_as_base_error():
        files = read_json(index, limit=_INDEX_LIMIT).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise BaseModelError(f"{escape_text(index)} has no weight_map", hint="the index is damaged")
    for name, file in files.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise BaseModelError(
                f"{escape_text(index)}: {escape_text(name)} is in {escape_text(file)}, which is not a shard"
            )
    return files


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
    """Return a shard in PyTorch's older format: plain tensors only, never code."""
    # Files from before PyTorch 1.6 are not zip files, and cannot be mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        tensors: object = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        raise BaseModelError(
            f"{escape_text(file)}: not a file of plain tensors; it may carry code and is not read: "
            f"{_first_line_of(error)}",
            hint="save it as safetensors",
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in tensors.items()):
        raise BaseModelError(f"{escape_text(file)}: a mapping of names to plain tensors was expected")
    name = re.sub(r"^pytorch_model", "model", file.stem) + ".safetensors"
    return Shard(name, {key: tensor.detach() for key, tensor in tensors.items()}, {"format": "pt"})


def _is_plain(tensor: object) -> bool:
    """Whether a value is a dense tensor whose storage holds all its bytes: a stride of 0 shows terabytes of a few."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


@contextlib.contextmanager
def _raise_as_base_error() -> Iterator[None]:
    """Raise an AdapterError of the block as a BaseModelError."""
    try:
        yield
    except AdapterError as error:
        raise BaseModelError(error.message, hint=error.hint) from None


def _first_line_of(error: Exception) -> str:
    return escape_text((str(error).splitlines() or [type(error).__name__])[0])
