"""`predict`."""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from lora_kit.cli.app import Allow, AsJson, Replace, Store, app
from lora_kit.cli.eval import show_row_progress
from lora_kit.cli.output import print_table, print_text
from lora_kit.cli.process import show_progress_lines
from lora_kit.errors import ConfigError
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.data.unlabeled_rows import UnlabeledRows
    from lora_kit.evaluation.predict import Predictor
    from lora_kit.evaluation.prediction import Prediction

_BATCHES_AT_ONCE: Final = 16
"""Batches that are predicted, and then written, together; their texts are sorted by length."""

Results = Iterator[tuple[int, "str | tuple[str, ...]", "Prediction"]]
"""The line, the input and the prediction of each row."""


@app.command
def predict(
    *,
    adapter: Annotated[str | None, Parameter(name=["--adapter", "-a"])] = None,
    base: str | None = None,
    text: Annotated[list[str] | None, Parameter(negative="")] = None,
    text_pair: Annotated[list[str] | None, Parameter(negative="")] = None,
    data: Path | None = None,
    out: Path | None = None,
    replace: Replace = False,
    quantize: str | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: AsJson = False,
) -> None:
    """Predict labels, numbers or entities of texts, with probabilities.

    Example: lora-kit predict --adapter mine --text "where is my parcel"

    Args:
        adapter: Adapter of task classify or tokens: a folder, a name in the store, or a hub id; without one the base's
            own head predicts.
        base: Base model: hub id, local folder or kit-base; by default the one that the adapter names, where it is here.
        text: A text; may be repeated.
        text_pair: The second text of each, for an adapter that was trained on pairs of texts.
        data: File of rows with text, perhaps text_pair, or words; labels are not needed.
        out: File for the predictions, .csv or .jsonl; without it they are printed.
        quantize: Load the base in nf4, nf4-double, fp4, fp4-double or int8.
        batch_size: Rows at once.
        max_length: Tokens of a text, at most; by default as in the training of the adapter.
    """
    from lora_kit.evaluation.eval_report import check_predictions_file
    from lora_kit.evaluation.predict import open_predictor
    from lora_kit.evaluation.prediction_file import check_suffix
    from lora_kit.models.infer_base import infer_base

    if bool(text) == (data is not None):
        raise ConfigError("predict takes either --text or --data", hint='--text "…", or --data rows.jsonl')
    if out is not None:
        check_suffix(out)
        check_predictions_file(out, replace=replace)
    chosen = base or infer_base([adapter] if adapter else [], store=store)
    predictor_of = open_predictor(
        chosen,
        adapter,
        batch_size=batch_size,
        max_length=max_length,
        store=store,
        quantize=quantize,
        allow=allow or (),
    )
    with show_progress_lines(), show_row_progress() as on_progress, predictor_of as predictor:
        rows = _read_rows(text or [], text_pair or [], data, predictor.task)
        results = _predict_rows(predictor, rows, batch_size, lambda done: on_progress("rows", done, len(rows)))
        _write_results(results, predictor.kind, out, json=json)


def _read_rows(texts: list[str], pairs: list[str], data: Path | None, task: str) -> UnlabeledRows:
    from lora_kit.data.unlabeled_rows import UnlabeledRows, read_unlabeled_rows

    if data is not None:
        if pairs:
            raise ConfigError("a second text goes with --text; a file has a column text_pair")
        return read_unlabeled_rows(data, task)
    if pairs and len(pairs) != len(texts):
        raise ConfigError(f"{len(texts)} --text and {len(pairs)} second texts were given", hint="give one for each")
    inputs = tuple(zip(texts, pairs, strict=True)) if pairs else tuple(texts)
    return UnlabeledRows(tuple(range(1, len(inputs) + 1)), inputs)


def _predict_rows(
    predictor: Predictor, rows: UnlabeledRows, batch_size: int, on_rows: Callable[[int], None]
) -> Results:
    """Yield predictions in the order of the rows, some batches at a time."""
    done = cut = 0
    size = _BATCHES_AT_ONCE * batch_size
    for start in range(0, len(rows), size):
        lines, inputs = rows.lines[start : start + size], rows.inputs[start : start + size]
        predictions = predictor.predict(inputs)
        cut += sum(prediction.cut for prediction in predictions)
        yield from zip(lines, inputs, predictions, strict=True)
        done += len(inputs)
        on_rows(done)
    if cut:
        print(f"note: {cut:,} of {len(rows):,} texts were too long and lost their end", file=sys.stderr)


def _write_results(results: Results, kind: str, out: Path | None, *, json: bool) -> None:
    from lora_kit.evaluation.prediction_file import (
        PredictionWriter,
        format_rows,
        list_columns,
        prediction_to_json,
    )
    from lora_kit.io.atomic_write import stage_file

    if out is not None:
        count = 0
        with stage_file(out) as staging, staging.open("x", encoding="utf-8", newline="") as file:
            writer = PredictionWriter(file, out.suffix, kind)
            for each in results:
                writer.write(*each)
                count += 1
        print_text(f"written: {out}, {count:,} rows")
    elif json:
        for each in results:
            print(json_format.dumps(prediction_to_json(*each)))
    else:
        cells = [row for _, given, each in results for row in format_rows(kind, given, each)]
        print_table(list_columns(kind), cells)
