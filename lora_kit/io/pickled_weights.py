"""Weight files of PyTorch, which are pickles: plain tensors are read, never code."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lora_kit.errors import AdapterError, format_list
from lora_kit.io.read import read_regular_file, refuse_lfs_pointer
from lora_kit.io.safetensors import PICKLE_MAGIC, ChunkCallback, WeightFileContents
from lora_kit.io.text import escape_text

_STATE_DICT_NAMES: Final = ("state_dict", "model_state_dict", "model", "module")
"""Under which training loops put the state dict of their model: Lightning, plain PyTorch, DeepSpeed."""
_LORA_MARK: Final = ".lora_"
"""What the keys of LoRA weights have in common, whoever wrote them."""
_MAX_NESTING: Final = 8


def read_pickle(path: Path, *, check_size: Callable[[int], None], seen: ChunkCallback) -> WeightFileContents:
    """Read the tensors of an older `adapter_model.bin`: plain tensors only, never code.

    Args:
        check_size, seen: as in `read_safetensors`.

    Raises:
        AdapterError: the file holds anything but a mapping from names to tensors.
        StorageError: it cannot be read.
    """
    return _extract_tensors(_load_pickle(path, check_size, seen), path)


def read_checkpoint(path: Path, *, check_size: Callable[[int], None], seen: ChunkCallback) -> WeightFileContents:
    """Read the model's tensors of a training checkpoint, which may lie deep in it: `{"state_dict": {...}, "epoch": 3}`.

    The state dict is the one with LoRA weights, wherever it is; without any, the one under the usual names.

    Args:
        check_size, seen: as in `read_safetensors`.

    Raises:
        AdapterError, StorageError: as `read_pickle`; and several state dicts have LoRA weights.
    """
    value = _load_pickle(path, check_size, seen)
    adapters = dict(_find_adapters(value, "", _MAX_NESTING))
    if len({id(state) for state in adapters.values()}) > 1:
        raise AdapterError(
            f"{escape_text(path)}: several state dicts in it have LoRA weights: {format_list(sorted(adapters))}",
            hint="save the state dict of one model on its own",
        )
    return _extract_tensors(next(iter(adapters.values()), _find_usual_state_dict(value)), path)


def _find_adapters(value: object, name: str, depth: int) -> Iterator[tuple[str, object]]:
    """Yield (name, mapping) of the mappings in a checkpoint that have tensors of LoRA weights."""
    if not depth or not isinstance(value, (dict, list, tuple)):
        return
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    if any(isinstance(key, str) and _LORA_MARK in key and isinstance(part, Tensor) for key, part in items):
        yield name, value
        return
    for key, part in items:
        yield from _find_adapters(part, f"{name}.{escape_text(key)}".removeprefix("."), depth - 1)


def _find_usual_state_dict(value: object) -> object:
    for _ in range(_MAX_NESTING):
        parts = value if isinstance(value, dict) else {}
        inner = next((parts[name] for name in _STATE_DICT_NAMES if isinstance(parts.get(name), dict)), None)
        value = value if inner is None else inner
    return value


def _load_pickle(path: Path, check_size: Callable[[int], None], seen: ChunkCallback) -> object:
    """Return what a pickle holds, without running code of it."""
    source, data = escape_text(path), read_regular_file(path, check_size=check_size)
    seen(data)
    refuse_lfs_pointer(bytes(data[:64]), source)
    _refuse_zip_bomb(data, source)
    try:
        value: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # damaged pickles fail in every way there is
        raise AdapterError(
            f"{source}: not a file of plain tensors; it may carry code and is not read", hint="save it as safetensors"
        ) from None
    return value


def _extract_tensors(value: object, path: Path) -> WeightFileContents:
    if not isinstance(value, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in value.items()):
        raise AdapterError(f"{escape_text(path)}: a mapping of names to plain tensors was expected")
    return WeightFileContents({name: tensor.detach().contiguous() for name, tensor in value.items()}, canonical=False)


def _is_plain(tensor: object) -> bool:
    """Return whether a value is a dense tensor that owns the bytes it shows; a stride of 0 makes terabytes of a few."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _refuse_zip_bomb(data: memoryview, source: str) -> None:
    """Raise AdapterError for compressed entries, which may be of any size; PyTorch stores its entries uncompressed."""
    if not bytes(data[:8]).startswith(PICKLE_MAGIC[0]):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [(item.compress_type, item.file_size) for item in archive.infolist()]
    except Exception:
        raise AdapterError(f"{source}: corrupt: neither a whole zip file nor a pickle") from None
    if any(kind != zipfile.ZIP_STORED for kind, _ in sizes) or sum(size for _, size in sizes) > len(data):
        raise AdapterError(f"{source}: a compressed file; it is not read", hint="save it as safetensors")
