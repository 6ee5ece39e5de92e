"""The identity of an adapter. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Final

from lora_kit.config.lora_config import LoraConfig

_IDENTITY_FIELDS: Final = (
    "lora_alpha",
    "alpha_pattern",
    "modules_to_save",
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)


def compute_digest(config: LoraConfig, weights_sha256: str) -> str:
    """Return the identity of an adapter: sha256 of what its config means, and of its weights in canonical form.

    Args:
        weights_sha256: of the canonical weight file.
    """
    fields = config.to_dict()
    meaning = {name: _normalize_numbers(fields[name]) for name in _IDENTITY_FIELDS}
    if config.target_parameters:
        meaning["target_parameters"] = fields["target_parameters"]
    if config.trainable_token_indices:
        meaning["trainable_token_indices"] = fields["trainable_token_indices"]
    return hashlib.sha256(f"{json.dumps(meaning)}\n{weights_sha256}".encode()).hexdigest()


def _normalize_numbers(value: object) -> object:
    """Return 16 for 16.0: a number's identity is its value."""
    if isinstance(value, Mapping):
        return {key: _normalize_numbers(item) for key, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
