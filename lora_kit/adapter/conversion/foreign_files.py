"""Read the files of another tool as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from lora_kit.adapter.conversion.other_tools import refuse_training_state
from lora_kit.adapter.folder import CONFIG, OLD_WEIGHTS, WEIGHTS
from lora_kit.errors import AdapterError, format_list
from lora_kit.io.pickled_weights import read_checkpoint
from lora_kit.io.read import exists, folder_exists, read_json
from lora_kit.io.safetensors import read_safetensors
from lora_kit.io.strict_json import JsonObject
from lora_kit.io.text import escape_text

MLX_WEIGHTS: Final = "adapters.safetensors"
_USUAL_FILE_NAMES: Final = (WEIGHTS, OLD_WEIGHTS, MLX_WEIGHTS)
_PICKLE_SUFFIXES: Final = (".bin", ".ckpt", ".pt", ".pth", ".lora")
_INDEX_SUFFIX: Final = ".index.json"
_INDEX_NAMES: Final = tuple(f"{name}{_INDEX_SUFFIX}" for name in (WEIGHTS, OLD_WEIGHTS))
_CONFIG_LIMIT: Final = 2**20
_INDEX_LIMIT: Final = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class ForeignFiles:
    """The files of an adapter.

    Attributes:
        weights: the weight file, or the index of several.
        sha256: of their bytes, one file after the other.
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
        tensors: dict[str, Tensor] = {}
        for file in _list_shards(weights) if weights.name.endswith(_INDEX_SUFFIX) else (weights,):
            reader = read_checkpoint if file.suffix in _PICKLE_SUFFIXES else read_safetensors
            tensors |= reader(file, check_size=lambda size: None, seen=sha.update).tensors
        config = weights.parent / CONFIG
        fields = read_json(config, limit=_CONFIG_LIMIT) if exists(config) else None
        return cls(weights=weights, sha256=sha.hexdigest(), tensors=tensors, fields=fields)


def _find_only_weights_file(folder: Path) -> Path:
    for name in (*_USUAL_FILE_NAMES, *_INDEX_NAMES):
        if exists(folder / name):
            return folder / name
    refuse_training_state(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix in (*_PICKLE_SUFFIXES, ".safetensors"))
    if len(files) != 1:
        names = format_list([escape_text(file.name) for file in files])
        raise AdapterError(
            f"{escape_text(folder)} holds weight files: {names}; one was expected", hint="give the file itself"
        )
    return files[0]


def _list_shards(index: Path) -> list[Path]:
    """Return the files of an index, in the order of their names.

    Raises:
        AdapterError: the index is damaged, names a file elsewhere, or one that is missing.
    """
    weight_map = read_json(index, limit=_INDEX_LIMIT).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, Mapping) else []
    names = sorted({name for name in named if isinstance(name, str) and Path(name).name == name})
    if not names or any(name not in names for name in named):
        raise AdapterError(f"{escape_text(index)}: its weight_map does not name files beside it")
    missing = [name for name in names if not exists(index.parent / name)]
    if missing:
        raise AdapterError(f"{escape_text(index)} names files that are missing: {format_list(missing)}")
    return [index.parent / name for name in names]
