"""The arithmetic of the metrics: labels against labels, texts against texts.

F1 of a class    2 TP / (2 TP + FP + FN), 0 where that is 0 / 0
macro            the mean over all classes that are true or predicted somewhere
micro            TP, FP and FN of all classes together
exact match      the share of texts that are one of their references, white space at both ends left out
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

LabelRows = Sequence[Sequence[int]]
"""The labels of each sample, by number."""
EntitySpan = tuple[int, int, str]
"""Where an entity begins and ends, and what it is."""


def score_labels(names: Sequence[str], true: LabelRows, given: LabelRows, *, labels: Sequence[str]) -> dict[str, float]:
    """Metrics of labels, by name.

    `f1` is, where texts have one of two labels, that of the second label; where the labels of words are of the form
    B-x, I-x and O, that of the entities they mark (a word apart counts as wrong); else it is `f1_macro`.

    Args:
        true, given: the right labels of each sample, and the predicted ones.
        labels: what the numbers mean.
    """
    flat_true, flat_given = ([label for row in rows for label in row] for rows in (true, given))
    counted = count_outcomes(flat_true, flat_given)
    ways: dict[str, Callable[[], float]] = {
        "accuracy": lambda: _compute_share(a == b for a, b in zip(flat_true, flat_given, strict=True)),
        "exact_match": lambda: _compute_share(list(a) == list(b) for a, b in zip(true, given, strict=True)),
        "f1_micro": lambda: compute_f1(*map(sum, zip(*counted.values(), strict=True))),
        "f1_macro": lambda: _compute_macro_f1(counted),
        "f1": lambda: _compute_default_f1(true, given, counted, labels),
    }
    return {name: ways[name]() for name in names}


def count_outcomes(true: Sequence[Any], given: Sequence[Any]) -> dict[Any, tuple[int, int, int]]:
    """(TP, FP, FN) of each class that is true or predicted somewhere."""
    right = Counter(a for a, b in zip(true, given, strict=True) if a == b)
    all_true, all_given = Counter(true), Counter(given)
    return {key: (right[key], all_given[key] - right[key], all_true[key] - right[key]) for key in all_true | all_given}


def compute_f1(right: int, wrong: int, missed: int) -> float:
    """2 TP / (2 TP + FP + FN); 0 where there is nothing."""
    return 2 * right / (2 * right + wrong + missed) if right else 0.0


def find_entities(tags: Sequence[str]) -> list[EntitySpan]:
    """The entities that B-x, I-x and O mark; an I-x that does not go on with an x begins one."""
    found: list[EntitySpan] = []
    for place, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark == "I" and found and found[-1][1:] == (place, kind):
            found[-1] = (found[-1][0], place + 1, kind)
        elif mark in ("B", "I"):
            found.append((place, place + 1, kind))
    return found


def _compute_default_f1(
    true: LabelRows, given: LabelRows, counted: Mapping[Any, tuple[int, int, int]], labels: Sequence[str]
) -> float:
    if is_bio_scheme(labels):
        return _compute_entity_f1(true, given, labels)
    if len(labels) == 2 and all(len(row) == 1 for row in true):
        return compute_f1(*counted.get(1, (0, 0, 0)))
    return _compute_macro_f1(counted)


def is_bio_scheme(labels: Sequence[str]) -> bool:
    """Whether labels are of the form B-x, I-x and O."""
    return any(label[:2] == "B-" for label in labels) and all(
        label == "O" or label[:2] in _BIO_PREFIXES for label in labels
    )


_BIO_PREFIXES: Final = ("B-", "I-")


def _compute_entity_f1(true: LabelRows, given: LabelRows, labels: Sequence[str]) -> float:
    """Of all entities together: one is right where its place and its kind are."""
    right = wrong = missed = 0
    for row_true, row_given in zip(true, given, strict=True):
        there, found = ({*find_entities([labels[label] for label in row])} for row in (row_true, row_given))
        right, wrong, missed = right + len(there & found), wrong + len(found - there), missed + len(there - found)
    return compute_f1(right, wrong, missed)


def _compute_macro_f1(counted: Mapping[Any, tuple[int, int, int]]) -> float:
    return sum(compute_f1(*each) for each in counted.values()) / len(counted)


def _compute_share(right: Iterator[bool]) -> float:
    found = list(right)
    return sum(found) / len(found)


# Texts


def score_texts(names: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of texts, by name.

    Args:
        texts: what was written, one text for each prompt.
        references: what would have been right, one text or more for each prompt.
    """
    written = [text.strip() for text in texts]
    wanted = [[text.strip() for text in each] for each in references]
    ways: dict[str, Callable[[], float]] = {
        "exact_match": lambda: _compute_share(text in each for text, each in zip(written, wanted, strict=True)),
        "bleu": lambda: _score_sacrebleu("BLEU", written, wanted),
        "chrf": lambda: _score_sacrebleu("CHRF", written, wanted),
        "rouge": lambda: _score_rouge_l(written, wanted),
    }
    return {name: ways[name]() for name in names}


def _score_sacrebleu(kind: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Over the whole corpus, with sacrebleu's own settings (Post 2018, arXiv:1804.08771)."""
    from sacrebleu import metrics

    most = max(map(len, references))
    # One stream for each place in the lists of references; None where a prompt has fewer.
    streams = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    score: float = getattr(metrics, kind)().corpus_score(list(texts), streams).score
    return score


def _score_rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The mean F of the longest common subsequence of words with the nearest reference (Lin 2004, W04-1013)."""
    from torchmetrics.functional.text import rouge_score

    found = rouge_score(list(texts), [list(each) for each in references], accumulate="best", rouge_keys="rougeL")
    return float(found["rougeL_fmeasure"])
