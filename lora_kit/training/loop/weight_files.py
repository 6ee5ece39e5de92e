"""The files of tensors in a checkpoint: what the adapter beside them holds already is not written twice.

A tensor whose bytes are in `adapter_model.safetensors` under another key is only named in the file's metadata:
`{name: key of the adapter}`. Where the adapter is what is trained, the file is nearly empty; where it is computed from
it (another initialization, an average of the weights), the file holds every tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_kit.adapter.folder import WEIGHTS as ADAPTER_WEIGHTS
from lora_kit.errors import AdapterError
from lora_kit.io.text import escape_text

_Content: TypeAlias = tuple[torch.dtype, torch.Size, str]
"""What two tensors have in common that are the same bit for bit."""


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name; those that the adapter in the same folder holds bit for bit are only named."""
    keys = {_identify(tensor): key for key, tensor in _load_adapter(file.parent).items()}
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    held = {name: keys[_identify(tensor)] for name, tensor in copies.items() if _identify(tensor) in keys}
    save_file({name: tensor for name, tensor in copies.items() if name not in held}, file, metadata=held)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors that `save_tensors` wrote.

    Raises:
        AdapterError: the adapter beside the file does not hold one that the file names.
    """
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        held: Mapping[str, str] = opened.metadata() or {}
    beside = _load_adapter(file.parent) if held else {}
    missing = [key for key in held.values() if key not in beside]
    if missing:
        raise AdapterError(f"{escape_text(file.parent / ADAPTER_WEIGHTS)} does not hold {escape_text(missing[0])}")
    return tensors | {name: beside[key] for name, key in held.items()}


def _load_adapter(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the adapter in a folder; none where it holds no adapter."""
    return load_file(folder / ADAPTER_WEIGHTS) if (folder / ADAPTER_WEIGHTS).is_file() else {}


def _identify(tensor: Tensor) -> _Content:
    data = tensor.contiguous().flatten().view(torch.uint8)
    return tensor.dtype, tensor.shape, hashlib.sha256(data.numpy().data).hexdigest()
