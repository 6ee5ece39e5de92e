"""What stands in the files of another tool, before anything is made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lora_kit.adapter.folder import CONFIG, OLD_WEIGHTS, WEIGHTS
from lora_kit.errors import AdapterError, format_list
from lora_kit.io.read import exists, folder_exists, read_json
from lora_kit.io.safetensors import read_pickle, read_safetensors
from lora_kit.io.text import escape_text

MLX_WEIGHTS: Final = "adapters.safetensors"
_USUAL_FILE_NAMES: Final = (WEIGHTS, OLD_WEIGHTS, MLX_WEIGHTS)
_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth")
_CONFIG_LIMIT: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class ForeignFiles:
    """The files of an adapter.

    Attributes:
        weights: the weight file. sha256: of its bytes.
        tensors: what it holds.
        fields: of the `adapter_config.json` beside it; None where there is none.
    """

    weights: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    fields: Mapping[str, Any] | None

    @classmethod
    def of(cls, path: Path) -> ForeignFiles:
        """Read a weight file, or the one of a folder; never more than plain tensors.

        Raises:
            AdapterError: there is none, or not one, or it cannot be read.
        """
        weights = _find_only_weights_file(path) if folder_exists(path) else path
        sha = hashlib.sha256()
        reader = read_pickle if weights.suffix in _PICKLE_SUFFIXES else read_safetensors
        found = reader(weights, check_size=lambda size: None, seen=sha.update)
        config = weights.parent / CONFIG
        fields = read_json(config, limit=_CONFIG_LIMIT) if exists(config) else None
        return cls(weights=weights, sha256=sha.hexdigest(), tensors=found.tensors, fields=fields)


def _find_only_weights_file(folder: Path) -> Path:
    for name in _USUAL_FILE_NAMES:
        if exists(folder / name):
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in (*_PICKLE_SUFFIXES, ".safetensors"))
    if len(found) != 1:
        told = format_list([escape_text(file.name) for file in found])
        raise AdapterError(
            f"{escape_text(folder)} holds weight files: {told}; one was expected", hint="give the file itself"
        )
    return found[0]
