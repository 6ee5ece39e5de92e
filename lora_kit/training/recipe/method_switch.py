"""Another method for a recipe, by a flag: what only the method before had is dropped, with a warning.

A recipe is written for one method. `--method full` on one for LoRA would otherwise be an error for its `lora`
section, or train every weight at a learning rate that is right for an adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from lora_kit.errors import format_list
from lora_kit.training.recipe.coerce import Section

logger = logging.getLogger(__name__)

_METHOD: Final = "method"
_DEFAULT_METHOD: Final = "lora"
_RATE, _HEAD_RATE = "learning_rate", "head_learning_rate"
_RATES: Final = (_RATE, _HEAD_RATE, "loraplus_lr_ratio")
"""Keys of `train` that are right for one method only."""
_KEPT_BY_FEATURES: Final = ("modules_to_save", "base_model_name_or_path", "revision", "task_type", "inference_mode")


def switch_method(fields: Section, overrides: Section) -> dict[str, object]:
    """Return the fields of a recipe without the keys of its own method, where a flag gives it another one.

    `features` trains the head alone, so a learning rate of the head becomes the learning rate.
    """
    method, before = overrides.get(_METHOD), fields.get(_METHOD) or _DEFAULT_METHOD
    if method is None or method == before:
        return dict(fields)
    sections = {name: fields[name] for name in ("lora", "peft", "train") if isinstance(fields.get(name), Mapping)}
    kept = {name: _keep_section(name, values, str(method)) for name, values in sections.items()}
    dropped = [f"{name}.{key}" for name, values in sections.items() for key in values if key not in kept[name]]
    result = {**fields, **kept}
    for name in ("lora", "peft"):
        if name in result and not result[name]:
            del result[name]
    head_rate = sections.get("train", {}).get(_HEAD_RATE)
    if method == "features" and head_rate is not None:
        result["train"] = {**kept["train"], _RATE: head_rate}
    if dropped:
        what = f", train.{_RATE} is that of the head" if method == "features" and head_rate is not None else ""
        message = "method %s instead of %s: the recipe's %s are dropped%s"
        logger.warning(message, method, before, format_list(dropped, most=len(dropped)), what)
    return result


def _keep_section(name: str, values: Section, method: str) -> dict[str, object]:
    """Return the keys of a section that mean the same in another method."""
    if name == "train":
        return {key: value for key, value in values.items() if key not in _RATES}
    if name == "lora" and method == "features":
        return {key: value for key, value in values.items() if key in _KEPT_BY_FEATURES}
    return dict(values) if name == method else {}
