"""Tensors of an adapter from bytes: nothing is believed or allocated before it was checked.

A safetensors file is 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}` and
the payload (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import io
import math
import zipfile
from io import BufferedReader
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lora_kit.errors import AdapterError
from lora_kit.files import printable
from lora_kit.strictjson import parse_object, shown

MAX_HEADER: Final = 8 * 2**20
MAX_DIMENSIONS: Final = 8
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What is read, by safetensors' name."""
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class _Entry(NamedTuple):
    """Where one tensor lies in the payload."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


def check_safetensors(file: BufferedReader, size: int, *, source: str) -> None:
    """Read the header alone and check that it describes a file of this size.

    Raises:
        AdapterError: truncated, corrupt, or not a safetensors file; says which.
    """
    length = _header_length(file.read(64), size, source)
    file.seek(8)
    _layout(file.read(length), size - 8 - length, source)


def parse_safetensors(data: memoryview, *, source: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. They share the memory of `data`.

    Raises:
        AdapterError: truncated, corrupt, or not a safetensors file; says which.
    """
    start = 8 + _header_length(bytes(data[:64]), len(data), source)
    entries = _layout(bytes(data[8:start]), len(data) - start, source)
    return {entry.name: _tensor(data, start, entry) for entry in entries}


def parse_pickle(data: memoryview, *, source: str) -> dict[str, Tensor]:
    """The tensors of an older `adapter_model.bin`: plain tensors only, never code.

    Raises:
        AdapterError: it holds anything but a mapping of names to tensors.
    """
    _refuse_pointer(bytes(data[:64]), source)
    _refuse_bomb(data, source)
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # damaged pickles fail in every way there is
        raise AdapterError(
            f"{source}: not a file of plain tensors; it may carry code and is not read", hint="save it as safetensors"
        ) from None
    if not isinstance(value, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in value.items()):
        raise AdapterError(f"{source}: a mapping of names to plain tensors was expected")
    return {name: tensor.detach().contiguous() for name, tensor in value.items()}


def _is_plain(tensor: Any) -> bool:
    """Whether a value is a dense tensor that owns as many bytes as it shows; a stride of 0 makes terabytes of a few."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _refuse_bomb(data: memoryview, source: str) -> None:
    """PyTorch stores the entries of its zip files as they are; one that is compressed may be of any size."""
    if not bytes(data[:8]).startswith(_PICKLES[0]):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [(item.compress_type, item.file_size) for item in archive.infolist()]
    except Exception:
        raise AdapterError(f"{source}: corrupt: neither a whole zip file nor a pickle") from None
    if any(kind != zipfile.ZIP_STORED for kind, _ in sizes) or sum(size for _, size in sizes) > len(data):
        raise AdapterError(f"{source}: a compressed file; it is not read", hint="save it as safetensors")


def _refuse_pointer(start: bytes, source: str) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise AdapterError(f"{source}: a git-lfs pointer, not the weights", hint="run 'git lfs pull'")


def _header_length(start: bytes, size: int, source: str) -> int:
    _refuse_pointer(start, source)
    length = int.from_bytes(start[:8], "little")
    # A pickle's first bytes may be a small header's length as well; only with those after them they are a huge one.
    if start.startswith(_PICKLES) and (length > MAX_HEADER or size < 8):
        raise AdapterError(
            f"{source}: a pickle under the name of safetensors; it is not read", hint="save it as safetensors"
        )
    if size < 8:
        raise AdapterError(f"{source}: truncated: {size} bytes, at least 8 are expected")
    if length > MAX_HEADER:
        raise AdapterError(
            f"{source}: corrupt: a header of {length:,} bytes is claimed, at most {MAX_HEADER:,} are read"
        )
    if size < 8 + length:
        raise AdapterError(f"{source}: truncated: {size:,} bytes, the header alone needs {8 + length:,}")
    return length


def _layout(header: bytes, payload: int, source: str) -> list[_Entry]:
    """The tensors in the order of their bytes: each begins where the last one ends, and the last ends with the file."""
    try:
        if not header.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        fields = parse_object(header.decode("utf-8"))
    except ValueError as error:
        raise AdapterError(f"{source}: corrupt header: {error}") from None
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{source}: corrupt header: __metadata__ is not a mapping of text to text")
    entries = sorted((_entry(name, fields[name], source) for name in fields), key=lambda entry: entry[:2])
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise AdapterError(
                f"{source}: corrupt: {printable(entry.name)} begins at byte {entry.begin:,}, {position:,} is expected"
            )
        position = entry.end
    if position > payload:
        raise AdapterError(f"{source}: truncated: {payload:,} bytes of tensors, {position:,} are expected")
    if position < payload:
        raise AdapterError(f"{source}: corrupt: {payload - position:,} bytes after the last tensor")
    return entries


def _entry(name: str, fields: Any, source: str) -> _Entry:
    where = f"{source}: corrupt: {printable(name)}"
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        sizes = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise AdapterError(f"{where} is not described as a tensor") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise AdapterError(f"{where} has dtype {shown(dtype)}, which is not read")
    if len(fields) != 3 or not all(type(number) is int and 0 <= number < 2**63 for number in sizes):
        raise AdapterError(f"{where} has shape {shown(shape)} at bytes {shown([begin, end])}, which is none")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or 0 in shape:
        raise AdapterError(
            f"{where} has shape {shown(shape)}; no dimension may be 0, and {MAX_DIMENSIONS} are the most"
        )
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != size:
        raise AdapterError(f"{where} of shape {shape} needs {size:,} bytes, {end - begin:,} are given")
    return _Entry(begin, end, name, DTYPES[dtype], shape)


def _tensor(data: memoryview, start: int, entry: _Entry) -> Tensor:
    """A view of the payload; a copy where it is not aligned, or where a byte of a bool might be neither 0 nor 1."""
    begin, count = start + entry.begin, math.prod(entry.shape)
    if entry.dtype is torch.bool:
        return torch.frombuffer(data, dtype=torch.uint8, count=count, offset=begin).reshape(entry.shape) != 0
    if begin % entry.dtype.itemsize:
        data, begin = memoryview(bytearray(data[begin : start + entry.end])), 0
    return torch.frombuffer(data, dtype=entry.dtype, count=count, offset=begin).reshape(entry.shape)
