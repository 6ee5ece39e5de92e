"""The head of a model: which modules it is made of, and whether a checkpoint had it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from lora_kit.errors import BaseModelError, format_list
from lora_kit.targets.match import HEAD_NAMES

logger = logging.getLogger(__name__)

LABEL_TASKS: Final = ("classify", "tokens")
"""Tasks whose labels have names, and whose head a checkpoint need not have."""


def check_loading_info(source: str, task: str, info: Mapping[str, Any]) -> None:
    """Refuse a model of which the checkpoint fills only a part; a new classification head is expected and said."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    head = [key for key in missing if task in LABEL_TASKS and key.split(".")[0] in HEAD_NAMES]
    absent = [key for key in missing if key not in head]
    if absent or mismatched or info["error_msgs"]:
        misfits = format_list(mismatched) if mismatched else " ".join(map(str, info["error_msgs"]))
        what = f"{format_list(absent)} missing" if absent else f"{misfits} of another shape"
        resized = mismatched and task in LABEL_TASKS
        hint = "a head of another size was asked for" if resized else "the checkpoint is not whole"
        raise BaseModelError(f"{source}: the weights do not fill the model: {what}", hint=hint)
    if head:
        logger.info("%s: new head, not in the checkpoint: %s", source, format_list(head))


def find_head_modules(model: Any, task: str) -> tuple[str, ...]:
    """Paths of the modules that make up the model's head: what feature extraction trains.

    Raises:
        BaseModelError: the model has no head that is known.
    """
    if task in LABEL_TASKS:
        parts = [name for name, child in model.named_children() if name in HEAD_NAMES]
        found = tuple(name for name in parts if any(True for _ in getattr(model, name).parameters()))
    else:
        output = model.get_output_embeddings()
        found = tuple(name for name, module in model.named_modules() if module is output and output is not None)[:1]
    if not found:
        hint = "name it in lora.modules_to_save"
        raise BaseModelError(f"{type(model).__name__} has no head that is known", hint=hint)
    return found
