"""What a model predicts of texts and words, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lora_kit.evaluation.forward import ForwardResult
from lora_kit.models.tasks import LABEL, LABEL_SET, VALUE

LabelAnswer = str | tuple[str, ...]
"""A label, or a number as text; for a set of labels and for words a tuple of labels."""


def name_answers(kind: str, forward: ForwardResult, labels: Sequence[str]) -> tuple[LabelAnswer, ...]:
    """Return what is predicted of each sample.

    Args:
        kind: of the samples, whose labels are no tokens.
        forward: the result of a pass over them.
        labels: the names of the classes.
    """
    if kind == VALUE:
        assert forward.scores is not None
        return tuple(format_value(float(value)) for value in forward.scores[:, 0])
    if kind == LABEL:
        return tuple(labels[label] for (label,) in forward.predicted)
    return tuple(tuple(labels[label] for label in row) for row in forward.predicted)


def name_target(kind: str, target: Tensor, labels: Sequence[str]) -> LabelAnswer:
    """Return what is to be predicted of a whole text; arguments as in `name_answers`."""
    if kind == VALUE:
        return format_value(float(target))
    if kind == LABEL_SET:
        return tuple(labels[number] for number in target.nonzero().flatten().tolist())
    return labels[int(target)]


def format_value(value: float) -> str:
    """Return a number that is predicted, or to be predicted, as text."""
    return f"{value:.6g}"


def describe_answer(answer: LabelAnswer) -> str:
    """Return an answer as one line."""
    return answer if isinstance(answer, str) else ", ".join(answer) or "none"
