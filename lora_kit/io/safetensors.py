"""Weight files: nothing is trusted or allocated before it is checked; what is written has one canonical form.

A safetensors file is 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}` and
the payload (https://huggingface.co/docs/safetensors). Its canonical form is the one safetensors itself writes: wide
dtypes first, then by name, nothing between the tensors, the header padded to 8 bytes. The same tensors have the same
canonical bytes, so the sha256 of these is the identity of the tensors.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import operator
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_kit.errors import AdapterError, format_list
from lora_kit.io.read import allocate_buffer, open_regular_file, read_into, read_regular_file, refuse_lfs_pointer
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
_STATE_DICT_NAMES: Final = ("state_dict", "model_state_dict", "model", "module")
"""Under which training loops put the state dict of their model: Lightning, plain PyTorch, DeepSpeed."""
_LORA_MARK: Final = ".lora_"
"""What the keys of LoRA weights have in common, whoever wrote them."""
_MAX_NESTING: Final = 8
_PICKLE_MAGIC: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


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
        entries = _parse_header(file, head, size, source)
        seen(memoryview(head))
        payload = allocate_buffer(size - len(head), source)
        filled = read_into(file, payload, seen)
    if filled < len(payload):  # it has shrunk meanwhile
        raise AdapterError(f"{source}: truncated: {filled:,} bytes of tensors, {len(payload):,} are expected")
    return WeightFileContents(_view_tensors(payload, entries), canonical=_is_canonical(head, entries))


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
    if not bytes(data[:8]).startswith(_PICKLE_MAGIC[0]):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = [(item.compress_type, item.file_size) for item in archive.infolist()]
    except Exception:
        raise AdapterError(f"{source}: corrupt: neither a whole zip file nor a pickle") from None
    if any(kind != zipfile.ZIP_STORED for kind, _ in sizes) or sum(size for _, size in sizes) > len(data):
        raise AdapterError(f"{source}: a compressed file; it is not read", hint="save it as safetensors")


def _read_header(file: BufferedReader, size: int, source: str) -> bytes:
    """Read the length and the header from the beginning of a file, once the length fits the file."""
    start = file.read(64)
    refuse_lfs_pointer(start, source)
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


def _parse_header(file: BufferedReader, head: bytes, size: int, source: str) -> list[_TensorHeader]:
    """Return the tensors of a file in the order of their bytes.

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
    return sorted(_check_tensor_header(name, fields[name], source) for name in fields)


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
