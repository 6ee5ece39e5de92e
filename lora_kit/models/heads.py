"""The head of a model: which modules it consists of, and whether the checkpoint has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_kit.errors import BaseModelError, format_list
from lora_kit.models.tasks import LABEL_TASKS
from lora_kit.targets.match import HEAD_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def check_loading_info(source: str, task: str, info: Mapping[str, Any]) -> None:
    """Reject a model that the checkpoint fills only in part. A new classification head is accepted, and logged.

    Args:
        source: of the model, for messages.
        task: of the model.
        info: what `from_pretrained` returns with `output_loading_info`.

    Raises:
        BaseModelError: weights are missing, have another shape, or could not be loaded.
    """
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    head = [key for key in missing if task in LABEL_TASKS and key.split(".")[0] in HEAD_NAMES]
    absent = [key for key in missing if key not in head]
    if absent or mismatched or info["error_msgs"]:
        details = format_list(mismatched) if mismatched else " ".join(map(str, info["error_msgs"]))
        problem = f"{format_list(absent)} missing" if absent else f"{details} of another shape"
        resized = mismatched and task in LABEL_TASKS
        hint = "num_labels differs from the checkpoint's head" if resized else "the checkpoint is incomplete"
        raise BaseModelError(f"{source}: the weights do not fill the model: {problem}", hint=hint)
    if head:
        logger.info("%s: new head, not in the checkpoint: %s", source, format_list(head))


def find_head_modules(model: PreTrainedModel, task: str) -> tuple[str, ...]:
    """Return the paths of the modules of the model's head. Feature extraction trains these.

    Raises:
        BaseModelError: the model has no known head.
    """
    if task in LABEL_TASKS:
        children = ((name, child) for name, child in model.named_children() if name in HEAD_NAMES)
        paths = tuple(name for name, child in children if any(True for _ in child.parameters()))
    else:
        output = model.get_output_embeddings()
        paths = tuple(name for name, module in model.named_modules() if output is not None and module is output)[:1]
    if not paths:
        raise BaseModelError(
            f"{type(model).__name__} has no head that is known", hint="name it in lora.modules_to_save"
        )
    return paths
