"""How a model is asked, as records say it: how prompts were presented, lengths, labels, inputs and thresholds.

An adapter has it in `lora_kit.json`. A whole model that was made here (merged, or trained in every weight) has it in
`lora_kit_model.json`, under the same names: it is asked without the adapter that knew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

logger = logging.getLogger(__name__)

MODEL_RECORD: Final = "lora_kit_model.json"
"""The file of a whole model that says how it is asked."""

_PROMPT_FIELDS: Final = ("separator", "chat_template", "chat_template_kwargs")


def find_common_use(records: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """Return what records say alike about how their adapters are asked; with a warning, nothing of what differs.

    Of lengths it is the longest. Metrics and the rest of a record are left out: they are not true of what is made of
    several adapters.
    """
    common: dict[str, object] = {}
    for name, (find, words) in _FIELDS.items():
        known = [value for value in map(find, records) if value or value is False]
        if known and all(value == known[0] for value in known):
            common[name] = known[0]
        elif known:
            logger.warning("the adapters were trained with different %s: the result has none", words)
    lengths = [length for record in records if (length := _find_length(record)) is not None]
    data = {**_as_mapping(common.pop("prompts", None)), **({"max_length": max(lengths)} if lengths else {})}
    return {**({"recipe": {"data": data}} if data else {}), **common}


def encode_model_record(use: Mapping[str, object]) -> bytes:
    """Return the content of `lora_kit_model.json`."""
    return f"{json.dumps(use, indent=2, sort_keys=True, ensure_ascii=False)}\n".encode()


def find_recorded_data(record: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the `data` section of the recipe in a record; None if the record has no recipe."""
    recipe = record.get("recipe")
    if not isinstance(recipe, Mapping):
        return None
    data = recipe.get("data")
    return data if isinstance(data, Mapping) else {}


def _find_prompt_fields(record: Mapping[str, object]) -> dict[str, object]:
    data = find_recorded_data(record) or {}
    return {name: data[name] for name in _PROMPT_FIELDS if data.get(name) not in (None, {})}


def _find_length(record: Mapping[str, object]) -> int | None:
    length = (find_recorded_data(record) or {}).get("max_length")
    return length if isinstance(length, int) else None


def _field_of(name: str) -> Callable[[Mapping[str, object]], object]:
    return lambda record: record.get(name)


_FIELDS: Final[Mapping[str, tuple[Callable[[Mapping[str, object]], object], str]]] = {
    "prompts": (_find_prompt_fields, "prompts (recipe.data.separator or chat_template)"),
    "labels": (_field_of("labels"), "labels"),
    "problem": (_field_of("problem"), "problems"),
    "text_pairs": (_field_of("text_pairs"), "inputs (some on texts, others on pairs of texts)"),
    "thresholds": (_field_of("thresholds"), "thresholds"),
}


def _as_mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
