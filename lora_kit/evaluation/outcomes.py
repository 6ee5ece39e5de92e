"""Rows with the answers of several models, as a report shows them: what is right, what is wrong, and how wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_kit.data.batches import EncodedDataset
from lora_kit.evaluation.eval_report import Answer, EvalCase
from lora_kit.evaluation.forward import DEFAULT_THRESHOLD, ForwardResult
from lora_kit.evaluation.sample_scores import collect_true_labels
from lora_kit.evaluation.scores import EntitySpan, compute_f1, count_outcomes, count_set_outcomes, find_entities
from lora_kit.models.tasks import LABEL, LABEL_SET, VALUE, WORD


@dataclass(frozen=True)
class ModelAnswers:
    """The answers of one model.

    Attributes:
        name: of the adapter, or `before` and `after`.
        said: the answer to each case.
        misses: how wrong each answer is, see `measure_misses`; empty for texts.
    """

    name: str
    said: Sequence[Answer]
    misses: Sequence[float] = ()


@dataclass(frozen=True)
class Outcomes:
    """Rows with the answers of several models.

    Attributes:
        kind: of the samples, as in `lora_kit.models.tasks`.
        cases: the rows or prompts.
        models: with their answers; the last one is what the report is about.
        labels: the names of the labels in the order of the classes.
        reference: the name of the model that the others are compared with; None without one.
        total: rows of the file, of which the cases may be a part.
        rejected: the answer to each case that was not to be learned, where rows have one.
    """

    kind: str
    cases: Sequence[EvalCase]
    models: Sequence[ModelAnswers]
    labels: Sequence[str] = ()
    reference: str | None = None
    total: int = 0
    rejected: Sequence[str] = field(default=())

    @property
    def main(self) -> ModelAnswers:
        """What the report is about."""
        return self.models[-1]

    @property
    def compared(self) -> ModelAnswers | None:
        """What it is compared with; None without anything, or where that is all there is."""
        found = next((model for model in self.models if model.name == self.reference), None)
        return None if found is self.main else found

    def is_right(self, model: ModelAnswers, index: int) -> bool:
        """Return whether an answer is what was expected; numbers never are, and texts where they equal a reference."""
        said, expected = model.said[index], self.cases[index].expected
        if self.kind == LABEL_SET:
            return set(said) == set(expected)
        if self.kind in (LABEL, WORD):
            return said == expected
        return self.kind != VALUE and isinstance(said, str) and said.strip() in {text.strip() for text in expected}


def measure_misses(
    samples: EncodedDataset, forward: ForwardResult, thresholds: Sequence[float] = ()
) -> tuple[float, ...]:
    """Return how wrong what is predicted of each sample is, 0 where it is right.

    Of one label: the probability of the wrong one. Of several: how far the worst one is on the wrong side of its
    threshold. Of a number: the distance. Of words: the share of wrong ones.
    """
    if samples.kind == VALUE:
        assert forward.scores is not None
        return tuple((forward.scores[:, 0] - samples.labels).abs().tolist())
    pairs = zip(collect_true_labels(samples), forward.predicted, strict=True)
    if forward.scores is None:
        return tuple(sum(a != b for a, b in zip(true, said, strict=True)) / max(len(said), 1) for true, said in pairs)
    scores = forward.scores.tolist()
    if samples.kind == LABEL:
        return tuple(
            0.0 if list(said) == list(true) else row[said[0]] for (true, said), row in zip(pairs, scores, strict=True)
        )
    limits = list(thresholds) or [DEFAULT_THRESHOLD] * len(scores[0])
    return tuple(
        max((abs(row[wrong] - limits[wrong]) for wrong in set(true) ^ set(said)), default=0.0)
        for (true, said), row in zip(pairs, scores, strict=True)
    )


@dataclass(frozen=True)
class LabelFigures:
    """How good a model is at one label.

    Attributes:
        count: how often it is expected.
        precision: share of what was predicted so that is right; None where it was never predicted.
        recall: share of what is expected so that was found; None where it never is.
        f1: their harmonic mean.
    """

    count: int
    precision: float | None
    recall: float | None
    f1: float


def compute_label_figures(outcomes: Outcomes, model: ModelAnswers) -> Mapping[str, LabelFigures]:
    """Return the figures of each label that is expected or predicted somewhere; of words those of entity types."""
    if outcomes.kind == WORD:
        counts = _count_entities(outcomes, model)
        return {name: _describe_counts(*counts[name]) for name in sorted(counts)}
    ids = {name: number for number, name in enumerate(outcomes.labels)}
    true, said = (
        [[ids[name] for name in ((answer,) if isinstance(answer, str) else answer)] for answer in answers]
        for answers in ([case.expected for case in outcomes.cases], model.said)
    )
    if outcomes.kind == LABEL_SET:
        found = count_set_outcomes(true, said)
    else:
        found = count_outcomes([row[0] for row in true], [row[0] for row in said])
    return {outcomes.labels[number]: _describe_counts(*found[number]) for number in sorted(found)}


def _describe_counts(right: int, wrong: int, missed: int) -> LabelFigures:
    return LabelFigures(
        count=right + missed,
        precision=right / (right + wrong) if right + wrong else None,
        recall=right / (right + missed) if right + missed else None,
        f1=compute_f1(right, wrong, missed),
    )


def _count_entities(outcomes: Outcomes, model: ModelAnswers) -> dict[str, tuple[int, int, int]]:
    """Return (TP, FP, FN) of each entity type; of each label where the labels mark no entities."""
    right, expected, predicted = Counter[str](), Counter[str](), Counter[str]()
    for case, said in zip(outcomes.cases, model.said, strict=True):
        true, found = set(mark_spans(case.expected)), set(mark_spans(said))
        right.update(kind for *_, kind in true & found)
        expected.update(kind for *_, kind in true)
        predicted.update(kind for *_, kind in found)
    return {
        kind: (right[kind], predicted[kind] - right[kind], expected[kind] - right[kind])
        for kind in expected | predicted
    }


def mark_spans(tags: Sequence[str]) -> list[EntitySpan]:
    """Return the entities that tags mark; where they are of another form than B-x and I-x, each word but O is one."""
    if any(tag[:2] in ("B-", "I-") for tag in tags):
        return find_entities(tags)
    return [(index, index + 1, tag) for index, tag in enumerate(tags) if tag != "O"]


def count_confusions(outcomes: Outcomes, model: ModelAnswers) -> Counter[tuple[str, str]]:
    """Return how often each expected label was taken for each label: (expected, predicted)."""
    return Counter((str(case.expected), str(said)) for case, said in zip(outcomes.cases, model.said, strict=True))
