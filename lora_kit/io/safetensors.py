"""Weight files: read with nothing believed or allocated before it was checked, written in one canonical form.

A safetensors file is 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}` and
the payload (https://huggingface.co/docs/safetensors). Its canonical form is the one safetensors itself writes: wide
dtypes first, then by name, nothing between the tensors, the header padded to 8 bytes. The same tensors have the same
canonical bytes, so their sha256 says what the tensors are.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import operator
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lora_kit.errors import AdapterError
from lora_kit.io.read import allocate_buffer, open_regular_file, read_into, read_regular_file
from lora_kit.io.strict_json import parse_object
from lora_kit.io.text import escape_text, format_value

ChunkCallback = Callable[[memoryview], object]
"""Is given every byte of a file as it is read, in order."""

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
_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_DTYPE_ORDER: Final = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_DTYPE_SIZES: Final = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_PICKLE_MAGIC: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class WeightFileContents(NamedTuple):
    """What a weight file holds.

    Attributes:
        tensors: on the CPU; they share memory.
        canonical: whether the file's bytes are the canonical form of the tensors.
    """

    tensors: dict[str, Tensor]
    canonical: bool


class _TensorHeader(NamedTuple):
    """Where one tensor lies in the payload."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


# Reading


def read_safetensors(path: Path, *, check_size: Callable[[int], None], seen: ChunkCallback) -> WeightFileContents:
    """The tensors of a safetensors file. Its bytes are read once, and only if its header fits its size.

    Args:
        check_size: is given the size of the file, and raises to refuse it.
        seen: is given the file's bytes as they are read.

    Raises:
        AdapterError: truncated, corrupt, or not a safetensors file; says which. StorageError: it cannot be read.
    """
    source = escape_text(path)
    with open_regular_file(path) as (file, size):
        check_size(size)
        head = _read_header(file, size, source)
        entries = _parse_header(head[8:], size - len(head), source)
        seen(memoryview(head))
        payload = allocate_buffer(size - len(head), source)
        filled = read_into(file, payload, seen)
    if filled < len(payload):  # it has shrunk meanwhile
        raise AdapterError(f"{source}: truncated: {filled:,} bytes of tensors, {len(payload):,} are expected")
    return WeightFileContents(_view_tensors(payload, entries), canonical=_is_canonical(head, entries))


def read_pickle(path: Path, *, check_size: Callable[[int], None], seen: ChunkCallback) -> WeightFileContents:
    """The tensors of an older `adapter_model.bin`: plain tensors only, never code.

    Args:
        check_size, seen: as in `read_safetensors`.

    Raises:
        AdapterError: it holds anything but a mapping of names to tensors. StorageError: it cannot be read.
    """
    source, data = escape_text(path), read_regular_file(path, check_size=check_size)
    seen(data)
    _refuse_lfs_pointer(bytes(data[:64]), source)
    _refuse_zip_bomb(data, source)
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # damaged pickles fail in every way there is
        raise AdapterError(
            f"{source}: not a file of plain tensors; it may carry code and is not read", hint="save it as safetensors"
        ) from None
    if not isinstance(value, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in value.items()):
        raise AdapterError(f"{source}: a mapping of names to plain tensors was expected")
    return WeightFileContents({name: tensor.detach().contiguous() for name, tensor in value.items()}, canonical=False)


def _is_plain(tensor: Any) -> bool:
    """Whether a value is a dense tensor that owns as many bytes as it shows; a stride of 0 makes terabytes of a few."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _refuse_zip_bomb(data: memoryview, source: str) -> None:
    """PyTorch stores the entries of its zip files as they are; one that is compressed may be of any size."""
    if not bytes(data[:8]).startswith(_PICKLE_MAGIC[0]):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [(item.compress_type, item.file_size) for item in archive.infolist()]
    except Exception:
        raise AdapterError(f"{source}: corrupt: neither a whole zip file nor a pickle") from None
    if any(kind != zipfile.ZIP_STORED for kind, _ in sizes) or sum(size for _, size in sizes) > len(data):
        raise AdapterError(f"{source}: a compressed file; it is not read", hint="save it as safetensors")


def _refuse_lfs_pointer(start: bytes, source: str) -> None:
    if start.startswith(b"version https://git-lfs"):
        raise AdapterError(f"{source}: a git-lfs pointer, not the weights", hint="run 'git lfs pull'")


def _read_header(file: BufferedReader, size: int, source: str) -> bytes:
    """The length and the header, from the beginning of a file."""
    start = file.read(64)
    _refuse_lfs_pointer(start, source)
    length = int.from_bytes(start[:8], "little")
    # A pickle's first bytes may be a small header's length as well; only with those after them they are a huge one.
    if start.startswith(_PICKLE_MAGIC) and (length > MAX_HEADER or size < 8):
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


def _parse_header(header: bytes, payload: int, source: str) -> list[_TensorHeader]:
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
    entries = sorted(_parse_tensor_header(name, fields[name], source) for name in fields)
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise AdapterError(
                f"{source}: corrupt: {escape_text(entry.name)} begins at byte {entry.begin:,}, {position:,} is expected"
            )
        position = entry.end
    if position > payload:
        raise AdapterError(f"{source}: truncated: {payload:,} bytes of tensors, {position:,} are expected")
    if position < payload:
        raise AdapterError(f"{source}: corrupt: {payload - position:,} bytes after the last tensor")
    return entries


def _parse_tensor_header(name: str, fields: Any, source: str) -> _TensorHeader:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError):
        raise _corrupt_tensor_error(source, name, "is not described as a tensor") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _corrupt_tensor_error(source, name, f"has dtype {format_value(dtype)}, which is not read")
    if len(fields) != 3 or {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) >= 2**63:
        raise _corrupt_tensor_error(
            source, name, f"has shape {format_value(shape)} at bytes {format_value([begin, end])}, which is none"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or 0 in shape:
        told = f"has shape {format_value(shape)}; no dimension may be 0, and {MAX_DIMENSIONS} are the most"
        raise _corrupt_tensor_error(source, name, told)
    size = math.prod(shape) * _DTYPE_SIZES[dtype]
    if end - begin != size:
        raise _corrupt_tensor_error(source, name, f"of shape {shape} needs {size:,} bytes, {end - begin:,} are given")
    return _TensorHeader(begin, end, name, DTYPES[dtype], shape)


def _corrupt_tensor_error(source: str, name: str, told: str) -> AdapterError:
    return AdapterError(f"{source}: corrupt: {escape_text(name)} {told}")


def _view_tensors(payload: memoryview, entries: Sequence[_TensorHeader]) -> dict[str, Tensor]:
    """Views of the payload; copies where it is not aligned, or where a byte of a bool might be neither 0 nor 1."""
    tensors: dict[str, Tensor] = {}
    for dtype, group in itertools.groupby(entries, key=operator.attrgetter("dtype")):
        run = list(group)  # they follow one another, so that they are parts of one
        part = payload[run[0].begin : run[-1].end]
        if run[0].begin % dtype.itemsize:
            part = memoryview(bytearray(part))
        whole = torch.frombuffer(part, dtype=torch.uint8 if dtype is torch.bool else dtype)
        whole = whole != 0 if dtype is torch.bool else whole
        parts = whole.split([(entry.end - entry.begin) // dtype.itemsize for entry in run])
        tensors |= {entry.name: flat.view(entry.shape) for entry, flat in zip(run, parts, strict=True)}
    return tensors


def _is_canonical(head: bytes, entries: Sequence[_TensorHeader]) -> bool:
    """Whether a file is the canonical form of its tensors; with bools, whose bytes may be neither 0 nor 1, none is."""
    ordered = sorted(entries, key=lambda entry: (_DTYPE_ORDER[entry.dtype], entry.name))
    return head == _encode_header(ordered) and all(entry.dtype is not torch.bool for entry in entries)


# Writing


def encode_safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the safetensors file that stands for these tensors, piece by piece."""
    entries, end = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (_DTYPE_ORDER[item[1].dtype], item[0])):
        begin, end = end, end + tensor.nbytes
        entries.append(_TensorHeader(begin, end, name, tensor.dtype, list(tensor.shape)))
    yield _encode_header(entries)
    for entry in entries:
        yield tensors[entry.name].contiguous().view(-1).view(torch.uint8).numpy().data


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the canonical bytes: the same for the same tensors, whatever file they came from."""
    sha = hashlib.sha256()
    for piece in encode_safetensors(tensors):
        sha.update(piece)
    return sha.hexdigest()


def _encode_header(entries: Sequence[_TensorHeader]) -> bytes:
    """Length and header of a file, as safetensors writes them."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for begin, end, name, dtype, shape in entries:
        fields[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
