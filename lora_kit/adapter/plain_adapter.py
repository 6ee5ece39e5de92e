"""An adapter of ours read with numpy alone, to be looked at: no torch, which takes seconds to import.

Only what the record of its folder proves to be what was saved, byte for byte, and only LoRA weights of linear layers
and embeddings, and `modules_to_save`. Everything else is left to `Adapter.load`, which says what is wrong with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import safetensors
from numpy.typing import NDArray

from lora_kit.adapter.adapter_digest import compute_digest
from lora_kit.adapter.folder import WEIGHTS, AdapterFolder
from lora_kit.config.lora_config import LoraConfig
from lora_kit.config.module_patterns import make_ending_matcher
from lora_kit.errors import LoraKitError
from lora_kit.io.read import read_regular_file

FloatArray: TypeAlias = NDArray[np.floating[Any]]

_PREFIX: Final = "base_model.model."
_KINDS: Final = {
    ".lora_A.weight": ("linear", "A"),
    ".lora_B.weight": ("linear", "B"),
    ".lora_embedding_A": ("embedding", "A"),
    ".lora_embedding_B": ("embedding", "B"),
}
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, kw_only=True)
class WeightsToShow:
    """The LoRA weights of one layer.

    Attributes:
        kind: of the layer, as in `LoraWeights`.
        shape: (out, in) of the delta.
        rank: rows of A.
        factors: A (r, in) and B (out, r); of a mixture for each expert.
    """

    kind: str
    shape: tuple[int, int]
    rank: int
    factors: Sequence[tuple[FloatArray, FloatArray]]


@dataclass(frozen=True, kw_only=True)
class ContentToShow:
    """What an adapter holds.

    Attributes:
        config: of the adapter.
        record: content of its `lora_kit.json`.
        digest: its identity.
        weights: LoRA weights by path of their layer.
        saved: shapes of the tensors of `modules_to_save`, by key.
        parameters: number of values it holds.
        tokens: the tokens that it has embeddings of, by path of the embedding or head.
    """

    config: LoraConfig
    record: Mapping[str, Any]
    digest: str
    weights: Mapping[str, WeightsToShow]
    saved: Mapping[str, tuple[int, ...]]
    parameters: int
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def read_plain_adapter(folder: Path) -> ContentToShow | None:
    """Return what an adapter of ours holds; None for any that is not proved whole, or holds more than plain weights."""
    try:
        source = AdapterFolder.open(folder, allow=())
        if source.facts is None or source.weights.name != WEIGHTS or _needs_torch(source.config):
            return None
        data = bytes(read_regular_file(source.weights, check_size=lambda size: None))
        weights_sha256 = hashlib.sha256(data).hexdigest()
        source.check_unchanged(weights_sha256)
        # The same digest from the file as it is: then the file is the canonical one as well.
        digest = compute_digest(source.config, weights_sha256)
        source.check_identity(digest)
        named = {name: _decode(fields) for name, fields in safetensors.deserialize(data)}  # type: ignore[no-untyped-call]
    except (LoraKitError, KeyError, safetensors.SafetensorError):
        return None
    if not all(name.startswith(_PREFIX) for name in named):
        return None
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in named.items()}
    saved = {key: tensor.shape for key, tensor in tensors.items() if ".lora_" not in key}
    weights = _collect_weights(source.config, {key: tensor for key, tensor in tensors.items() if key not in saved})
    if weights is None or not _are_saved_modules(source.config, saved) or not _is_worth_showing(tensors):
        return None
    source.log_caveats()
    parameters = sum(tensor.size for tensor in tensors.values())
    return ContentToShow(
        config=source.config,
        record=dict(source.record or {}),
        digest=digest,
        weights=weights,
        saved=saved,
        parameters=parameters,
    )


def _needs_torch(config: LoraConfig) -> bool:
    """Return whether a config describes more than plain LoRA weights and saved modules."""
    more = config.target_parameters or config.trainable_token_indices or config.use_dora
    return bool(more) or config.starts_from_weight or config.ties_weights


def _decode(fields: Mapping[str, Any]) -> FloatArray:
    """Return a tensor of a file; raise KeyError for a dtype that is not a float of at most 32 bits."""
    values = np.frombuffer(fields["data"], dtype=_DTYPES[fields["dtype"]])
    if fields["dtype"] == "BF16":  # the upper half of a float32
        values = (values.astype("<u4") << 16).view("<f4")
    return values.reshape(fields["shape"])


def _collect_weights(config: LoraConfig, tensors: Mapping[str, FloatArray]) -> dict[str, WeightsToShow] | None:
    """Return the LoRA weights by path; None where a key or a shape is another than the config's."""
    sides: dict[tuple[str, str], dict[str, FloatArray]] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in _KINDS if key.endswith(ending)), None)
        if ending is None or tensor.ndim != 2:
            return None
        kind, side = _KINDS[ending]
        sides.setdefault((key.removesuffix(ending), kind), {})[side] = tensor
    weights: dict[str, WeightsToShow] = {}
    for (path, kind), each in sides.items():
        a, b = each.get("A"), each.get("B")
        if a is None or b is None or path in weights or not len(a) == b.shape[1] == config.rank_of(path):
            return None
        weights[path] = WeightsToShow(kind=kind, shape=(len(b), a.shape[1]), rank=len(a), factors=[(a, b)])
    return weights if weights or not config.target_modules else None


def _are_saved_modules(config: LoraConfig, keys: Mapping[str, object]) -> bool:
    is_saved = make_ending_matcher(config.modules_to_save)
    return all(any(is_saved(key[:end]) for end, letter in enumerate(key) if letter == ".") for key in keys)


def _is_worth_showing(tensors: Mapping[str, FloatArray]) -> bool:
    """Return whether there is nothing to warn of: every value is finite, and some B is not zero."""
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        return False
    factors = [tensor for key, tensor in tensors.items() if key.endswith(("_B.weight", "_B"))]
    return bool(tensors) and (not factors or any(tensor.any() for tensor in factors))
