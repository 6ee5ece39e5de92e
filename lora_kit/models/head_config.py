"""The fields of a model's config that describe its head: the labels, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_kit.errors import BaseModelError
from lora_kit.models.heads import list_checkpoint_labels, reason_new_head
from lora_kit.models.tasks import PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, find_problem_by_type

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def set_labels(
    config: PretrainedConfig, name: str, *, task: str, num_labels: int | None, label2id: Mapping[str, int] | None
) -> str | None:
    """Set the labels of a config; return why the checkpoint's head cannot be used for them, or None if it can."""
    if label2id is None:
        if num_labels is not None or config.problem_type == PROBLEM_TYPES[REGRESSION]:
            config.num_labels = num_labels or 1
        return None
    if num_labels is not None and num_labels != len(label2id):
        raise BaseModelError(f"num_labels is {num_labels}, but label2id names {len(label2id)} labels")
    labels = sorted(label2id, key=label2id.__getitem__)
    reason = reason_new_head(list_checkpoint_labels(config, task), labels)
    config.label2id, config.id2label = dict(label2id), {number: label for label, number in label2id.items()}
    return reason


def set_problem(config: PretrainedConfig, problem: str | None) -> None:
    """Set what the head predicts: the problem that is given, else the checkpoint's own, else one label."""
    if problem is not None or find_problem_by_type(config.problem_type) is None:
        vars(config)["problem_type"] = PROBLEM_TYPES[problem or SINGLE_LABEL]
