"""Tensors of an adapter from bytes: the safetensors header is checked before anything is believed.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the payload
(https://huggingface.co/docs/safetensors). The values themselves are read by the safetensors library.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor

from lora_kit.errors import AdapterError

MAX_HEADER: Final = 8 * 2**20
_SIZES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def parse_safetensors(data: bytearray, *, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        AdapterError: truncated, corrupt, or not a safetensors file; says which.
    """
    header = _header(data, source)
    _check_layout(header, len(data) - 8 - int.from_bytes(data[:8], "little"), source)
    try:
        return safetensors.torch.load(bytes(data))
    except Exception as error:
        raise AdapterError(f"{source}: corrupt: {error}") from None


def parse_pickle(data: bytearray, *, source: str) -> dict[str, Tensor]:
    """The tensors of an older `adapter_model.bin`: plain tensors only, never code.

    Raises:
        AdapterError: it holds anything but a mapping of names to tensors.
    """
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError):
        raise AdapterError(
            f"{source}: not a file of plain tensors; it may carry code and is not read", hint="save it as safetensors"
        ) from None
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        raise AdapterError(f"{source}: a mapping of names to tensors was expected")
    return {name: tensor.detach().contiguous() for name, tensor in value.items()}


def _header(data: bytearray, source: str) -> dict[str, Any]:
    if data.startswith(b"version https://git-lfs"):
        raise AdapterError(f"{source}: a git-lfs pointer, not the weights", hint="run 'git lfs pull'")
    if data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise AdapterError(
            f"{source}: a pickle under the name of safetensors; it is not read", hint="save it as safetensors"
        )
    if len(data) < 8:
        raise AdapterError(f"{source}: truncated: {len(data)} bytes, at least 8 are expected")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise AdapterError(
            f"{source}: corrupt: a header of {length:,} bytes is claimed, at most {MAX_HEADER:,} are read"
        )
    if len(data) < 8 + length:
        raise AdapterError(f"{source}: truncated: {len(data):,} bytes, the header alone needs {8 + length:,}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{source}: corrupt header: {error}") from None
    if not isinstance(header, dict):
        raise AdapterError(f"{source}: corrupt header: an object was expected")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{max(names, key=names.count)!r} occurs twice")
    return dict(pairs)


def _check_layout(header: dict[str, Any], payload: int, source: str) -> None:
    """Every tensor's bytes follow the last one's, and the last ends where the file does."""
    spans = []
    for name, entry in header.items():
        spans.append((*_span(name, entry, source), name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise AdapterError(f"{source}: corrupt: {name} begins at byte {begin:,}, {position:,} is expected")
        position = end
    if position > payload:
        raise AdapterError(f"{source}: truncated: {payload:,} bytes of tensors, {position:,} are expected")
    if position < payload:
        raise AdapterError(f"{source}: corrupt: {payload - position:,} bytes after the last tensor")


def _span(name: str, entry: Any, source: str) -> tuple[int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in [*shape, begin, end])
    except (KeyError, TypeError, ValueError):
        raise AdapterError(f"{source}: corrupt: the entry of {name} is not one of a tensor") from None
    if not whole or dtype not in _SIZES:
        raise AdapterError(f"{source}: {name} has dtype {dtype!r} and shape {shape!r}: neither is read")
    if 0 in shape:
        raise AdapterError(f"{source}: {name} has an empty shape {shape}")
    size = math.prod(shape) * _SIZES[dtype]
    if end - begin != size:
        raise AdapterError(
            f"{source}: corrupt: {name} of shape {shape} needs {size:,} bytes, {end - begin:,} are given"
        )
    return begin, end
