"""What a model predicts of one text, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Entity:
    """A marked part of a text, or one word of it.

    Attributes:
        label: its type; without `B-` and `I-`.
        text: the part.
        start: index of its first character in the text.
        end: index after its last character.
        probability: of its labels, the least of all its words.
    """

    label: str
    text: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is predicted of a text.

    Attributes:
        labels: the label of the text; all that apply, where any number may; none for a number. For words the label of
            each, None for words that were cut off.
        probabilities: of each label of a text, the model's whole list; empty for words and numbers.
        value: the number of a regression; None for labels.
        entities: for words: the entities that `B-x`, `I-x` and `O` mark, or each word where the labels are others.
        cut: whether the text was too long and lost its end.
    """

    labels: tuple[str | None, ...] = ()
    probabilities: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    entities: tuple[Entity, ...] = ()
    cut: bool = False

    @property
    def label(self) -> str | None:
        """The label of a text that has one; None where there are several or none."""
        return self.labels[0] if len(self.labels) == 1 else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`; None without one."""
        return None if self.label is None else self.probabilities.get(self.label)

    def most_probable(self, count: int | None = None) -> list[tuple[str, float]]:
        """Return the most probable labels of a text with their probabilities, the greatest first; None for all."""
        return sorted(self.probabilities.items(), key=lambda pair: -pair[1])[:count]

    def to_json(self) -> dict[str, object]:
        """Return the prediction as JSON values: only the fields that its task has."""
        if self.value is not None:
            fields: dict[str, object] = {"value": self.value}
        elif self.probabilities:
            one = {"label": self.label, "probability": self.probability}
            fields = {"labels": list(self.labels), **(one if self.label else {})}
            fields["probabilities"] = dict(self.probabilities)
        else:
            fields = {"labels": list(self.labels), "entities": [asdict(entity) for entity in self.entities]}
        return {**fields, "cut": True} if self.cut else fields
