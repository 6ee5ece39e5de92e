"""Arithmetic of the metrics: labels against labels, texts against texts.

F1 of a class    2 TP / (2 TP + FP + FN); the F1 of a class that is neither true nor predicted is NaN
macro            the mean over all classes that are true or predicted somewhere
micro            TP, FP and FN of all classes together
exact match      the share of texts that equal one of their references, ignoring white space at both ends
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from lora_kit.evaluation.metrics import F1_PER_LABEL

LabelRows = Sequence[Sequence[int]]
"""The classes of each sample."""
EntitySpan = tuple[int, int, str]
"""Where an entity begins and ends, and its type."""
Outcomes = Mapping[int, tuple[int, int, int]]
"""True positives, false positives and false negatives of each class."""


def score_labels(
    names: Sequence[str], true: LabelRows, predicted: LabelRows, *, labels: Sequence[str], is_set: bool = False
) -> dict[str, float]:
    """Return metrics of labels, by name; `f1_per_label` has one value for each label, called `f1[label]`.

    `f1` is that of the second label if texts have one of two labels; that of the marked entities if the labels of words
    are of the form B-x, I-x and O (one wrong word makes the entity wrong); else it is `f1_macro`.

    Args:
        names: the metrics to compute.
        true: the right labels of each sample.
        predicted: the predicted labels of each sample.
        labels: the names of the classes.
        is_set: whether a sample has any number of labels; its accuracy is then 1 if all of them are right, else 0.
    """
    if is_set:
        outcomes = count_set_outcomes(true, predicted)
        right: Iterable[bool] = (set(a) == set(b) for a, b in zip(true, predicted, strict=True))
    else:
        flat_true, flat_predicted = ([label for row in rows for label in row] for rows in (true, predicted))
        outcomes = count_outcomes(flat_true, flat_predicted)
        right = (a == b for a, b in zip(flat_true, flat_predicted, strict=True))
    metrics: dict[str, Callable[[], float]] = {
        "accuracy": lambda: _compute_share(right),
        "exact_match": lambda: _compute_share(list(a) == list(b) for a, b in zip(true, predicted, strict=True)),
        "f1_micro": lambda: compute_f1(*map(sum, zip(*outcomes.values(), strict=True))) if outcomes else 0.0,
        "f1_macro": lambda: _compute_macro_f1(outcomes),
        "f1": lambda: _compute_macro_f1(outcomes) if is_set else _compute_default_f1(true, predicted, outcomes, labels),
    }
    values = {name: metrics[name]() for name in names if name != F1_PER_LABEL}
    return values | (_compute_label_f1s(outcomes, labels) if F1_PER_LABEL in names else {})


def _compute_label_f1s(outcomes: Outcomes, labels: Sequence[str]) -> dict[str, float]:
    """Return the F1 of each label; NaN of one that is neither true nor predicted anywhere, which is 0 / 0."""
    return {
        f"f1[{name}]": compute_f1(*outcomes[number]) if number in outcomes else math.nan
        for number, name in enumerate(labels)
    }


def count_set_outcomes(true: LabelRows, predicted: LabelRows) -> dict[int, tuple[int, int, int]]:
    """Return (TP, FP, FN) of each class that is true or predicted somewhere, where a sample has any number of them."""
    right = Counter(key for a, b in zip(true, predicted, strict=True) for key in set(a) & set(b))
    all_true, all_predicted = (Counter(key for row in rows for key in set(row)) for rows in (true, predicted))
    return _combine_counts(right, all_true, all_predicted)


def count_outcomes(true: Sequence[int], predicted: Sequence[int]) -> dict[int, tuple[int, int, int]]:
    """Return (TP, FP, FN) of each class that is true or predicted somewhere."""
    right = Counter(a for a, b in zip(true, predicted, strict=True) if a == b)
    return _combine_counts(right, Counter(true), Counter(predicted))


def _combine_counts(
    right: Counter[int], true: Counter[int], predicted: Counter[int]
) -> dict[int, tuple[int, int, int]]:
    return {key: (right[key], predicted[key] - right[key], true[key] - right[key]) for key in true | predicted}


def compute_f1(right: int, wrong: int, missed: int) -> float:
    """Return 2 TP / (2 TP + FP + FN), or 0 if that is 0 / 0."""
    return 2 * right / (2 * right + wrong + missed) if right else 0.0


def find_entities(tags: Sequence[str]) -> list[EntitySpan]:
    """Return the entities that B-x, I-x and O mark; an I-x that does not continue an x begins one."""
    entities: list[EntitySpan] = []
    for index, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "I" and entities and entities[-1][1:] == (index, kind):
            entities[-1] = (entities[-1][0], index + 1, kind)
        elif mark in ("B", "I"):
            entities.append((index, index + 1, kind))
    return entities


def is_bio_scheme(labels: Sequence[str]) -> bool:
    """Return whether labels are of the form B-x, I-x and O."""
    marks = {label[:2] for label in labels if label != "O"}
    return "B-" in marks and marks <= {"B-", "I-"}


def _compute_default_f1(true: LabelRows, predicted: LabelRows, outcomes: Outcomes, labels: Sequence[str]) -> float:
    if is_bio_scheme(labels):
        return _compute_entity_f1(true, predicted, labels)
    if len(labels) == 2 and all(len(row) == 1 for row in true):
        return compute_f1(*outcomes.get(1, (0, 0, 0)))
    return _compute_macro_f1(outcomes)


def _compute_entity_f1(true: LabelRows, predicted: LabelRows, labels: Sequence[str]) -> float:
    """Return the F1 of all entities together; one is right if its span and its type are."""
    right = wrong = missed = 0
    for row_true, row_predicted in zip(true, predicted, strict=True):
        expected, actual = ({*find_entities([labels[label] for label in row])} for row in (row_true, row_predicted))
        right += len(expected & actual)
        wrong += len(actual - expected)
        missed += len(expected - actual)
    return compute_f1(right, wrong, missed)


def _compute_macro_f1(outcomes: Outcomes) -> float:
    return sum(compute_f1(*each) for each in outcomes.values()) / len(outcomes) if outcomes else 0.0


def _compute_share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


# Texts


def score_texts(names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return metrics of texts, by name.

    Args:
        names: the metrics to compute.
        texts: the generated texts, one for each prompt.
        references: the right texts, one or more for each prompt.
    """
    texts = [text.strip() for text in texts]
    references = [[text.strip() for text in each] for each in references]
    metrics: dict[str, Callable[[], float]] = {
        "exact_match": lambda: _compute_share(text in each for text, each in zip(texts, references, strict=True)),
        "bleu": lambda: _score_sacrebleu("BLEU", texts, references),
        "chrf": lambda: _score_sacrebleu("CHRF", texts, references),
        "rouge": lambda: _score_rouge_l(texts, references),
    }
    return {name: metrics[name]() for name in names}


def _score_sacrebleu(kind: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return a score of the whole corpus, with sacrebleu's own settings (Post 2018, arXiv:1804.08771)."""
    from sacrebleu import metrics

    most = max(map(len, references))
    # One stream for each index in the lists of references; None where a prompt has fewer.
    streams = [[each[index] if index < len(each) else None for each in references] for index in range(most)]
    score: float = getattr(metrics, kind)().corpus_score(list(texts), streams).score
    return score


def _score_rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean F of the longest common subsequence of words with the best reference (Lin 2004, W04-1013)."""
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(list(texts), [list(each) for each in references], accumulate="best", rouge_keys="rougeL")
    return float(scores["rougeL_fmeasure"])
