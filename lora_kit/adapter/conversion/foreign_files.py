"""Read the files of another tool as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from lora_kit.adapter.folder import CONFIG, OLD_WEIGHTS, WEIGHTS
from lora_kit.errors import AdapterError, format_list
from lora_kit.io.read import exists, folder_exists, read_json
from lora_kit.io.safetensors import read_checkpoint, read_safetensors
from lora_kit.io.strict_json import JsonObject
from lora_kit.io.text import escape_text

MLX_WEIGHTS: Final = "adapters.safetensors"
_USUAL_FILE_NAMES: Final = (WEIGHTS, OLD_WEIGHTS, MLX_WEIGHTS)
_PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pt", ".pth")
_CONFIG_LIMIT: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class ForeignFiles:
    """The files of an adapter.

    Attributes:
        weights: the weight file.
        sha256: of its bytes.
        tensors: that it holds, by its keys.
        fields: of the `adapter_config.json` beside it; None without that file.
    """

    weights: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    fields: JsonObject | None

    @classmethod
    def of(cls, path: Path) -> ForeignFiles:
        """Read a weight file, or the only one of a folder; never more than plain tensors.

        Raises:
            AdapterError: the file is missing or damaged, or there are several.
            StorageError: it cannot be read.
        """
        weights = _find_only_weights_file(path) if folder_exists(path) else path
        sha = hashlib.sha256()
        reader = read_checkpoint if weights.suffix in _PICKLE_SUFFIXES else read_safetensors
        contents = reader(weights, check_size=lambda size: None, seen=sha.update)
        config = weights.parent / CONFIG
        fields = read_json(config, limit=_CONFIG_LIMIT) if exists(config) else None
        return cls(weights=weights, sha256=sha.hexdigest(), tensors=contents.tensors, fields=fields)


def _find_only_weights_file(folder: Path) -> Path:
    for name in _USUAL_FILE_NAMES:
        if exists(folder / name):
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.suffix in (*_PICKLE_SUFFIXES, ".safetensors"))
    if len(files) != 1:
        names = format_list([escape_text(file.name) for file in files])
        raise AdapterError(
            f"{escape_text(folder)} holds weight files: {names}; one was expected", hint="give the file itself"
        )
    return files[0]
