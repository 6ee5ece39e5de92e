"""Predictions as rows: of a table, of a CSV file, or of JSONL."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Final, TypeAlias

from lora_kit.errors import ConfigError
from lora_kit.evaluation.label_answers import format_value
from lora_kit.evaluation.prediction import Prediction
from lora_kit.models.tasks import LABEL, LABEL_SET, VALUE, WORD

SUFFIXES: Final = (".csv", ".jsonl")

Input: TypeAlias = str | Sequence[str]
"""A text, two texts, or words."""

_COLUMNS: Final = {
    LABEL: ("label", "probability"),
    LABEL_SET: ("labels", "probabilities"),
    VALUE: ("value",),
    WORD: ("label", "start", "end", "probability"),
}
"""What is predicted, by the kind of the samples; of words a row for each entity."""


def check_suffix(path: Path) -> None:
    """Raise ConfigError for a file that predictions are not written to."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: predictions are written as CSV or JSONL", hint="name it .csv or .jsonl")


def list_columns(kind: str) -> tuple[str, ...]:
    """Return the names of the columns that a prediction fills: the input, then what is predicted."""
    return ("text", *_COLUMNS[kind])


def format_rows(kind: str, given: Input, prediction: Prediction) -> Iterator[tuple[str, ...]]:
    """Yield the cells of a prediction, one row for each text, for words one for each entity."""
    if kind == WORD:
        for entity in prediction.entities:
            yield entity.text, entity.label, str(entity.start), str(entity.end), f"{entity.probability:.4f}"
        return
    text = given if isinstance(given, str) else "\n".join(given)
    if kind == VALUE:
        assert prediction.value is not None
        yield text, format_value(prediction.value)
    elif kind == LABEL:
        yield text, str(prediction.label), f"{prediction.probability:.4f}"
    else:
        numbers = {name: round(value, 4) for name, value in prediction.probabilities.items()}
        labels, probabilities = (json.dumps(each, ensure_ascii=False) for each in (prediction.labels, numbers))
        yield text, labels, probabilities


def prediction_to_json(line: int, given: Input, prediction: Prediction) -> dict[str, object]:
    """Return a prediction with its line and its input as JSON values."""
    if isinstance(given, str):
        source: dict[str, object] = {"text": given}
    elif prediction.entities or (not prediction.probabilities and prediction.value is None):
        source = {"words": list(given)}
    else:
        source = {"text": given[0], "text_pair": given[1]}
    return {"line": line, **source, **prediction.to_json()}


class PredictionWriter:
    """Writes predictions to an open file, as CSV or JSONL.

    Args:
        file: opened for text with `newline=""`.
        suffix: `.csv` or `.jsonl`.
        kind: of the samples.
    """

    def __init__(self, file: IO[str], suffix: str, kind: str) -> None:
        self._file, self._kind = file, kind
        self._table = csv.writer(file) if suffix.lower() == ".csv" else None
        if self._table is not None:
            self._table.writerow(("line", *list_columns(kind)))

    def write(self, line: int, given: Input, prediction: Prediction) -> None:
        """Write one prediction."""
        if self._table is None:
            self._file.write(json.dumps(prediction_to_json(line, given, prediction), ensure_ascii=False) + "\n")
            return
        self._table.writerows((line, *cells) for cells in format_rows(self._kind, given, prediction))
