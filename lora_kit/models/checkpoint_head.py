"""What the config of a base says about its head, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_kit.models.heads import list_checkpoint_labels, order_labels
from lora_kit.models.locate import BaseSource, locate_base, translate_load_errors
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CLASSIFY, find_problem_by_type, infer_task_from_architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def find_label_order(base: str | Path, names: Sequence[str], *, task: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the labels of a base's head, and the labels of a training on it, each in the order of the classes.

    Args:
        base: as in `load_base`.
        names: the labels of the training rows, sorted.
        task: one whose labels have names.

    Returns:
        The labels of the head, empty if there is none for the task; and all of them again if it knows every name,
        else the names.

    Raises:
        BaseModelError: no base of that name.
    """
    with silence_libraries(), translate_load_errors(str(base)):
        head = list_checkpoint_labels(read_base_config(locate_base(base)), task)
    return head, order_labels(names, head)


def find_checkpoint_problem(base: str | Path) -> str | None:
    """Return what the head of a base predicts of a whole text; None where it has no such head, or does not say.

    Raises:
        BaseModelError: no base of that name.
    """
    with silence_libraries(), translate_load_errors(str(base)):
        config = read_base_config(locate_base(base))
    return find_problem_by_type(config.problem_type) if list_checkpoint_labels(config, CLASSIFY) else None


def find_checkpoint_task(base: str | Path) -> str:
    """Return the task of the head that a base has; `causal-lm` where its config names no class of another.

    Raises:
        BaseModelError: no base of that name.
    """
    with silence_libraries(), translate_load_errors(str(base)):
        config = read_base_config(locate_base(base))
    return infer_task_from_architecture(next(iter(config.architectures or []), "")).name


def read_base_config(source: BaseSource) -> PretrainedConfig:
    """Return the config of a base, without running code of its own."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(source.location, **source.loading_options)
    return config
