"""Rotary embeddings in a model's config, in the fields that transformers before 5 and other programs read.

transformers 5 writes `rope_parameters` alone. A program that knows only the older fields silently uses their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lora_kit.io.strict_json import JsonObject

_RENAMED: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert": {"rope_theta": "global_rope_theta", "rope_local_base_freq": "local_rope_theta"},
}
"""By `model_type`: what it called a field."""
_KINDS_OF_LAYERS: Final = ("full_attention", "sliding_attention")
_WITH_KINDS_OF_LAYERS: Final = ("gemma3_text", "modernbert")
"""Each `model_type` that had older fields for both kinds of layers."""


def add_older_rope_fields(config: JsonObject) -> None:
    """Add the older fields to a config and to those of its parts, where they are not there already."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name, value in derive_older_rope_fields(part).items():
            part.setdefault(name, value)


def derive_older_rope_fields(config: Mapping[str, object]) -> JsonObject:
    """Return `rope_theta`, `rope_scaling` and what else says the same as the `rope_parameters` of a config."""
    rope, model_type = config.get("rope_parameters"), str(config.get("model_type"))
    local: object = None
    if isinstance(rope, dict) and model_type in _WITH_KINDS_OF_LAYERS:
        rope, local = (rope.get(kind, rope) for kind in _KINDS_OF_LAYERS)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    older: JsonObject = {"rope_theta": rope["rope_theta"], "rope_scaling": _derive_scaling(rope, config)}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if isinstance(local, dict) and "rope_theta" in local:
        older["rope_local_base_freq"] = local["rope_theta"]
    renamed = _RENAMED.get(model_type, {})
    return {renamed.get(name, name): value for name, value in older.items()}


def _derive_scaling(rope: JsonObject, config: Mapping[str, object]) -> JsonObject | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "longrope" and "original_max_position_embeddings" in config:  # as Phi 3, which has these three alone
        return {"type": kind, **{name: rope[name] for name in ("short_factor", "long_factor") if name in rope}}
    return {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
