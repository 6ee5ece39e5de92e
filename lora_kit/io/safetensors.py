"""Weight files: nothing is trusted or allocated before it is checked; what is written has one canonical form.

A safetensors file is 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}` and
the payload (https://huggingface.co/docs/safetensors). Its canonical form is the one safetensors itself writes: wide
dtypes first, then by name, nothing between the tensors, the header padded to 8 bytes. The same tensors have the same
canonical bytes, so the sha256 of these is the identity of the tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_kit.errors import AdapterError
from lora_kit.io.read import allocate_buffer, open_regular_file, read_into, refuse_lfs_pointer
from lora_kit.io.strict_json import JsonObject, parse_object
from lora_kit.io.text import escape_text, format_value

ChunkCallback = Callable[[memoryview], object]
"""Is called with every byte of a file as it is read, in order."""

MAX_HEADER: Final = 8 * 2**20
MAX_DIMENSIONS: Final = 8
DTYPES: Final = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What is read, by safetensors' name, in the order of the canonical form."""
_DTYPE_NAMES: Final = {
    **{dtype: name for name, dtype in DTYPES.items()},
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}
"""What is written."""
_DTYPE_ORDER: Final = {dtype: position for position, dtype in enumerate(DTYPES.values())}
_METADATA: Final = {"format": "pt"}
PICKLE_MAGIC: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class WeightFileContents(NamedTuple):
    """What a weight file holds.

    Attributes:
        tensors: by name; on the CPU, sharing memory.
        canonical: whether the file's bytes are the canonical form of the tensors.
    """

    tensors: dict[str, Tensor]
    canonical: bool


class _TensorHeader(NamedTuple):
    """Where one tensor lies in the payload, from byte `begin` to before byte `end`."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


class _Header(NamedTuple):
    """The tensors of a file in the order of their bytes, and whether it is the canonical file of these tensors."""

    entries: list[_TensorHeader]
    canonical: bool


_KNOWN_HEADERS: Final[dict[tuple[bytes, int], _Header]] = {}
"""By the header's bytes and the file's size, which decide everything in it: adapters of one recipe have the same, so
that a server parses the header of its next adapter only once."""
_MOST_KNOWN: Final = 8
_LARGEST_KNOWN: Final = 2**18


# Reading


def read_safetensors(path: Path, *, check_size: Callable[[int], None], seen: ChunkCallback) -> WeightFileContents:
    """Read the tensors of a safetensors file: its bytes once, and only if its header fits its size.

    Args:
        check_size: is called with the size of the file in bytes, and raises to reject it.
        seen: is called with the file's bytes as they are read.

    Raises:
        AdapterError: the file is truncated, corrupt, or not a safetensors file; says which.
        StorageError: it cannot be read.
    """
    source = escape_text(path)
    with open_regular_file(path) as (file, size):
        check_size(size)
        head = _read_header(file, size, source)
        header = _KNOWN_HEADERS.get((head, size)) or _parse_header(file, head, size, source)
        seen(memoryview(head))
        payload = allocate_buffer(size - len(head), source)
        filled = read_into(file, payload, seen)
    if filled < len(payload):  # it has shrunk meanwhile
        raise AdapterError(f"{source}: truncated: {filled:,} bytes of tensors, {len(payload):,} are expected")
    return WeightFileContents(_view_tensors(payload, header.entries), canonical=header.canonical)


def _read_header(file: BufferedReader, size: int, source: str) -> bytes:
    """Read the length and the header from the beginning of a file, once the length fits the file."""
    start = file.read(64)
    refuse_lfs_pointer(start, source)
    length = int.from_bytes(start[:8], "little")
    # A pickle's first bytes may be a small header's length as well; only with those after them they are a huge one.
    if start.startswith(PICKLE_MAGIC) and (length > MAX_HEADER or size < 8):
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
    file.seek(0)
    return file.read(8 + length)


def _parse_header(file: BufferedReader, head: bytes, size: int, source: str) -> _Header:
    """Return what a header says, and remember it.

    The safetensors library checks that each tensor has the bytes that its dtype and shape need, that each begins where
    the last one ends, and that the last ends with the file. It reads any dtype, and the last of two equal names.
    """
    try:
        fields = parse_object(head[8:].decode("utf-8"))
        # The file that is open here, whatever has its path by now. Mapping it allocates nothing.
        with safe_open(f"/dev/fd/{file.fileno()}", framework="numpy"):
            pass
    except ValueError as error:
        raise AdapterError(f"{source}: corrupt header: {error}") from None
    except SafetensorError as error:
        raise AdapterError(f"{source}: {_describe_damage(str(error), fields, size - len(head))}") from None
    fields.pop("__metadata__", None)
    entries = sorted(_check_tensor_header(name, fields[name], source) for name in fields)
    header = _Header(entries, _is_canonical(head, entries))
    if len(head) <= _LARGEST_KNOWN:
        if len(_KNOWN_HEADERS) >= _MOST_KNOWN:
            _KNOWN_HEADERS.clear()
        _KNOWN_HEADERS[head, size] = header
    return header


def _describe_damage(message: str, fields: JsonObject, payload: int) -> str:
    """Say what the safetensors library has found, with both sizes where the tensors do not fill the file."""
    if "not fully covered" not in message:
        return f"corrupt: {escape_text(message.removeprefix('Error while deserializing header: '))}"
    end = max((tensor["data_offsets"][1] for name, tensor in fields.items() if name != "__metadata__"), default=0)
    if end > payload:
        return f"truncated: {payload:,} bytes of tensors, {end:,} are expected"
    return f"corrupt: {payload - end:,} bytes after the last tensor"


def _check_tensor_header(name: str, fields: JsonObject, source: str) -> _TensorHeader:
    """Check what the safetensors library does not: the dtype, the shape, and that a tensor has no other field."""
    problem = ""
    if not isinstance(fields, dict) or len(fields) != 3:
        problem = f"is described by {format_value(fields)}; dtype, shape and data_offsets are expected"
    elif not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        problem = f"has dtype {format_value(fields['dtype'])}, which is not supported"
    elif len(fields["shape"]) > MAX_DIMENSIONS or 0 in fields["shape"]:
        problem = f"has shape {format_value(fields['shape'])}; at most {MAX_DIMENSIONS} dimensions, none of 0, are read"
    if problem:
        raise AdapterError(f"{source}: corrupt: {escape_text(name)} {problem}")
    begin, end = fields["data_offsets"]
    return _TensorHeader(begin, end, name, DTYPES[fields["dtype"]], fields["shape"])


def _view_tensors(payload: memoryview, entries: Sequence[_TensorHeader]) -> dict[str, Tensor]:
    """Return views of the payload; copies where it is not aligned, or where a byte of a bool may be neither 0 nor 1."""
    tensors: dict[str, Tensor] = {}
    for dtype, group in itertools.groupby(entries, key=operator.attrgetter("dtype")):
        run = list(group)  # adjacent tensors of one dtype, so that one buffer is split
        data = payload[run[0].begin : run[-1].end]
        if run[0].begin % dtype.itemsize:
            data = memoryview(bytearray(data))
        whole = torch.frombuffer(data, dtype=torch.uint8 if dtype is torch.bool else dtype)
        whole = whole != 0 if dtype is torch.bool else whole
        parts = whole.split([(entry.end - entry.begin) // dtype.itemsize for entry in run])
        tensors |= {entry.name: flat.view(entry.shape) for entry, flat in zip(run, parts, strict=True)}
    return tensors


def _is_canonical(head: bytes, entries: Sequence[_TensorHeader]) -> bool:
    """Return whether a file is the canonical form of its tensors; never with bools, whose bytes may be any."""
    ordered = sorted(entries, key=lambda entry: (_DTYPE_ORDER[entry.dtype], entry.name))
    described = ((entry.name, entry.dtype, entry.shape) for entry in ordered)
    return head == encode_header(described) and all(entry.dtype is not torch.bool for entry in entries)


# Writing


def encode_safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the canonical safetensors file of these tensors, piece by piece."""
    names = sorted(tensors, key=lambda name: (_DTYPE_ORDER[tensors[name].dtype], name))
    yield encode_header((name, tensors[name].dtype, tensors[name].shape) for name in names)
    for name in names:
        yield tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the canonical bytes: the same for the same tensors, whatever file they came from."""
    sha = hashlib.sha256()
    for piece in encode_safetensors(tensors):
        sha.update(piece)
    return sha.hexdigest()


def encode_header(
    tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str] = _METADATA
) -> bytes:
    """Encode the length and the header of a safetensors file, padded to 8 bytes as the library does.

    Args:
        tensors: name, dtype and shape of each, in the order of their bytes.
        metadata: of the file.
    """
    fields: JsonObject = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": (begin, end)}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
