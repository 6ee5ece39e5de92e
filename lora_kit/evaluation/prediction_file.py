"""Predictions as rows: of a table, of a CSV file, or of JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, TypeAlias

from lora_kit.errors import ConfigError
from lora_kit.evaluation.label_answers import format_value
from lora_kit.evaluation.prediction import Prediction
from lora_kit.io.output_file import check_output_file
from lora_kit.io.text import escape_text
from lora_kit.models.tasks import LABEL, LABEL_SET, VALUE, WORD

SUFFIXES: Final = (".csv", ".jsonl")

Input: TypeAlias = str | Sequence[str]
"""A text, two texts, or words."""


def check_prediction_file(path: Path, *, replace: bool, inputs: Iterable[str | Path]) -> None:
    """Check that predictions can be written to a file, before any work.

    Raises:
        ConfigError: its name ends otherwise.
        StorageError: as `check_output_file`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{escape_text(path)}: predictions are written as CSV or JSONL", hint="name it .csv or .jsonl"
        )
    check_output_file(path, replace=replace, inputs=inputs)


@dataclass(frozen=True)
class PredictionForm:
    """How predictions of one kind are written.

    Attributes:
        kind: of the samples.
        top: how many of the most probable labels are written; None for the predicted ones, and in JSON all.
    """

    kind: str
    top: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns: the input, then what is predicted; of words a row is one entity."""
        if self.kind == LABEL:
            further = range(2, (self.top or 1) + 1)
            numbered = (f"{name}_{number}" for number in further for name in ("label", "probability"))
            return ("text", "label", "probability", *numbered)
        own = {
            LABEL_SET: ("labels", "probabilities"),
            VALUE: ("value",),
            WORD: ("label", "start", "end", "probability"),
        }
        return ("text", *own[self.kind])

    def format_rows(self, given: Input, prediction: Prediction) -> Iterator[tuple[str, ...]]:
        """Yield the cells of a prediction, one row for each text, for words one for each entity."""
        if self.kind == WORD:
            for entity in prediction.entities:
                yield entity.text, entity.label, str(entity.start), str(entity.end), f"{entity.probability:.4f}"
            return
        text = join_texts(given)
        if self.kind == VALUE:
            assert prediction.value is not None
            yield text, format_value(prediction.value)
        elif self.kind == LABEL:
            pairs = prediction.most_probable(self.top or 1)
            yield text, *(cell for name, value in pairs for cell in (name, f"{value:.4f}"))
        else:
            numbers = {name: round(value, 4) for name, value in prediction.most_probable(self.top)}
            numbers = numbers if self.top else {name: numbers[name] for name in prediction.probabilities}
            yield text, *(json.dumps(each, ensure_ascii=False) for each in (prediction.labels, numbers))

    def describe(self, prediction: Prediction) -> str:
        """Return a prediction on one line: `card 0.98`; several with commas between them."""
        if self.kind == VALUE:
            assert prediction.value is not None
            return format_value(prediction.value)
        if self.kind == WORD:
            return (
                ", ".join(f"{each.text} ({each.label} {each.probability:.2f})" for each in prediction.entities) or "–"
            )
        most = self.top or (1 if self.kind == LABEL else None)
        pairs = prediction.most_probable(most)
        chosen = pairs if self.top or self.kind == LABEL else [pair for pair in pairs if pair[0] in prediction.labels]
        return ", ".join(f"{name} {value:.2f}" for name, value in chosen) or "–"

    def to_json(self, given: Input, prediction: Prediction) -> dict[str, object]:
        """Return a prediction with its input as JSON values."""
        if isinstance(given, str):
            source: dict[str, object] = {"text": given}
        elif self.kind == WORD:
            source = {"words": list(given)}
        else:
            source = {"text": given[0], "text_pair": given[1]}
        fields = {**source, **prediction.to_json()}
        if self.top is not None:
            fields["probabilities"] = dict(prediction.most_probable(self.top))
        return fields


def join_texts(given: Input) -> str:
    """Return an input as one text: two texts on lines of their own."""
    return given if isinstance(given, str) else "\n".join(given)


class PredictionWriter:
    """Writes the predictions of one or several adapters to an open file, as CSV or JSONL.

    Args:
        file: opened for text with `newline=""`.
        suffix: `.csv` or `.jsonl`.
        forms: by the name of the adapter. With several, each row names the adapter; a CSV file has one kind of rows.
        has_ids: whether the rows have ids, which are written, too.

    Raises:
        ConfigError: the adapters' predictions have different columns, and the file is CSV.
    """

    def __init__(self, file: IO[str], suffix: str, forms: dict[str, PredictionForm], *, has_ids: bool = False) -> None:
        self._file, self._forms, self._are_named = file, forms, len(forms) > 1
        self._table = csv.writer(file) if suffix.lower() == ".csv" else None
        if self._table is not None:
            columns = {form.columns for form in forms.values()}
            if len(columns) > 1:
                raise ConfigError("these adapters predict different things", hint="name the file .jsonl")
            named = ("line", *["id"] * has_ids, *["adapter"] * self._are_named)
            self._table.writerow((*named, *columns.pop()))

    def write(self, row: Mapping[str, object], given: Input, predictions: dict[str, Prediction]) -> None:
        """Write the predictions of one input, by the name of the adapter.

        Args:
            row: its line, and its id where rows have one.
        """
        for name, prediction in predictions.items():
            owner = {"adapter": name} if self._are_named else {}
            if self._table is not None:
                rows = self._forms[name].format_rows(given, prediction)
                self._table.writerows((*row.values(), *owner.values(), *cells) for cells in rows)
            else:
                fields = {**owner, **row, **self._forms[name].to_json(given, prediction)}
                self._file.write(json.dumps(fields, ensure_ascii=False) + "\n")
