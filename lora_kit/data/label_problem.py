"""What the labels of texts are to a classifier: one of several, any number of several, or a number to be predicted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from lora_kit.data.records import Fault
from lora_kit.data.rows import Rows, build_fault_error, collect_label_names, sort_labels
from lora_kit.errors import DataError
from lora_kit.io.text import parse_number
from lora_kit.models.tasks import MULTI_LABEL, REGRESSION, REGRESSION_LABEL, SINGLE_LABEL

logger = logging.getLogger(__name__)

_MANY_NUMBERS: Final = 10
"""More different whole numbers than this, most of which occur once, are hardly the numbers of classes."""
_ROWS_PER_NUMBER: Final = 2
_NAME_IT: Final = "problem: regression, or problem: single-label if each number is a class"


def resolve_problem(rows: Rows, problem: str | None) -> str:
    """Return the problem that the labels of texts pose: the one that is given, else the one that follows from them.

    Lists of labels are several labels each; numbers of which one has a fraction are a regression; anything else is one
    label each.

    Args:
        rows: of the format `label`.
        problem: as a recipe says it; None if it says nothing.

    Raises:
        DataError: the labels do not have the form of the problem, or may be classes as well as numbers to be predicted.
    """
    resolved = problem or _infer_problem(rows)
    lists = [isinstance(value[1], tuple) for value in rows.values]
    if resolved == MULTI_LABEL and not all(lists):
        raise DataError(f"{rows.path}: problem multi-label takes a column labels with a list in each row")
    if resolved != MULTI_LABEL and any(lists):
        raise DataError(f"{rows.path}: the column labels lists several labels", hint=f"problem: {MULTI_LABEL}")
    if resolved == REGRESSION:
        check_numbers(rows)
        if problem is None:
            logger.warning("%s: the labels are numbers with fractions, so they are predicted as numbers: "
                           "problem: regression (problem: single-label makes each a class)", rows.path)  # fmt: skip
    return resolved


def _infer_problem(rows: Rows) -> str:
    labels = [value[1] for value in rows.values]
    if any(isinstance(label, tuple) for label in labels):
        return MULTI_LABEL
    numbers = [parse_number(label) for label in labels]
    if any(number is None for number in numbers):
        return SINGLE_LABEL
    if any(number != int(number) for number in numbers if number is not None):
        return REGRESSION
    if any(isinstance(label, float) for label in labels):
        raise DataError(f"{rows.path}: the labels are numbers such as {labels[0]!r}", hint=_NAME_IT)
    distinct = len(set(numbers))
    if distinct > _MANY_NUMBERS and len(labels) < _ROWS_PER_NUMBER * distinct:
        what = f"{rows.path}: {len(labels):,} rows have {distinct:,} different numbers as labels"
        raise DataError(f"{what}, which looks like a regression", hint=_NAME_IT)
    return SINGLE_LABEL


def check_numbers(rows: Rows) -> None:
    """Raise DataError with the lines of the rows whose label is not a number, as a regression needs it."""
    faults = [
        Fault(line, f"label must be a number for problem {REGRESSION}; {value[1]!r} was given")
        for line, value in zip(rows.lines, rows.values, strict=True)
        if parse_number(value[1]) is None
    ]
    if faults:
        raise build_fault_error(rows.path, faults)


def list_label_names(rows: Rows, problem: str) -> tuple[str, ...]:
    """Return the names of the labels that a model of a problem learns from rows, sorted.

    A regression has one output, `value`.

    Raises:
        DataError: there are fewer than two labels, or none of which any number may apply.
    """
    if problem == REGRESSION:
        return (REGRESSION_LABEL,)
    if problem == SINGLE_LABEL:
        return collect_label_names(rows)
    names = tuple(sort_labels({str(label) for labels in rows.labels for label in labels}))
    if not names:
        raise DataError(f"{rows.path}: no row has a label")
    return names


def count_labels(rows: Rows, names: Sequence[str]) -> list[int]:
    """Return how many texts or words have each label, in the order of the names."""
    counts = dict.fromkeys(names, 0)
    for labels in rows.labels:
        for label in labels:
            counts[str(label)] = counts.get(str(label), 0) + 1
    return [counts[name] for name in names]
