"""Weights of labels in the loss: `balanced`, or a number for each label by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeAlias

from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.models.tasks import MULTI_LABEL

BALANCED: Final = "balanced"

ClassWeights: TypeAlias = str | Mapping[str, float] | None
"""`balanced`; the weights of labels by their names; None for equal weights."""


def parse_class_weights(value: object) -> ClassWeights:
    """Return weights of labels as a recipe writes them, checked.

    Raises:
        RecipeError: it is neither `balanced` nor numbers above 0 by label.
    """
    if value is None or value == BALANCED:
        return value
    if not isinstance(value, Mapping) or not value:
        hint = "balanced, or a weight for each label: {rare: 3}"
        raise RecipeError(f"class_weights must be {BALANCED} or a mapping; {value!r} was given", hint=hint)
    for label, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise RecipeError(f"class_weights.{label} must be a number above 0; {weight!r} was given")
    return MappingProxyType({str(label): float(weight) for label, weight in value.items()})


def compute_class_weights(
    weights: ClassWeights, labels: Sequence[str], counts: Sequence[int], *, problem: str, total: int
) -> tuple[float, ...]:
    """Return the weight of each class; empty for equal weights.

    `balanced` is total / (classes · count), as in scikit-learn: every label then weighs the same in all. Where any
    number of labels apply, it is the number of texts without the label divided by that of the texts with it. A label
    that no training row has gets the weight 1.

    Args:
        weights: as a recipe has them.
        labels: the names of the labels in the order of the classes.
        counts: how many texts or words have each.
        problem: of the task.
        total: number of texts, or of words.

    Raises:
        RecipeError: a label with a weight is unknown.
    """
    if weights is None:
        return ()
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in labels]
        if unknown:
            hint = suggest_nearest(unknown[0], labels) or f"the labels are {format_list(labels)}"
            raise RecipeError(f"class_weights has {unknown[0]!r}, which is not a label of the training rows", hint=hint)
        return tuple(weights.get(name, 1.0) for name in labels)
    if problem == MULTI_LABEL:
        return tuple((total - count) / count if 0 < count < total else 1.0 for count in counts)
    present = sum(count > 0 for count in counts)
    return tuple(total / (present * count) if count else 1.0 for count in counts)
