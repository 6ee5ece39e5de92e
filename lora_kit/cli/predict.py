"""`predict`."""

from __future__ import annotations

import json as json_format
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from lora_kit.cli.app import Adapters, Allow, Replace, Store, app
from lora_kit.cli.eval import show_row_progress
from lora_kit.cli.output import create_console, print_table, print_text
from lora_kit.cli.prepare import Rename, parse_renames
from lora_kit.cli.process import show_progress_lines
from lora_kit.errors import ConfigError, format_list
from lora_kit.names import DEFAULT_STORE

if TYPE_CHECKING:
    from lora_kit.data.unlabeled_rows import UnlabeledRows
    from lora_kit.evaluation.predict import Predictor
    from lora_kit.evaluation.prediction import Prediction
    from lora_kit.evaluation.prediction_file import PredictionForm

_BATCHES_AT_ONCE: Final = 16
"""Batches that are predicted, and then written, together; their texts are sorted by length."""
_STANDARD_INPUT: Final = "-"

Results = Iterator[tuple[dict[str, object], "str | tuple[str, ...]", dict[str, "Prediction"]]]
"""What each row is called (its line, its id), its input, and its predictions by the name of the adapter."""

_JSON_HELP: Final = "Print JSON Lines instead of a table: a line for each row and adapter, unless --out is given."
DropEmpty = Annotated[
    list[str] | None,
    Parameter(negative="", consume_multiple=True, help="Rows to leave out: empty, those without a text."),
]
_AsJsonLines = Annotated[bool, Parameter(name="--json", negative="", help=_JSON_HELP)]


@app.command
def predict(
    text: Annotated[list[str] | None, Parameter(negative="", allow_leading_hyphen=True)] = None,
    *,
    adapter: Adapters | None = None,
    base: str | None = None,
    text_pair: Annotated[list[str] | None, Parameter(negative="")] = None,
    data: Path | None = None,
    rename: Rename = None,
    drop: DropEmpty = None,
    out: Path | None = None,
    replace: Replace = False,
    top_k: int | None = None,
    quantize: str | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    allow: Allow = None,
    store: Store = DEFAULT_STORE,
    json: _AsJsonLines = False,
) -> None:
    """Predict labels, numbers or entities of texts, with probabilities.

    Several adapters stand side by side. Without any, the base's own head predicts.

    Example: lora-kit predict --adapter mine "where is my parcel"

    Args:
        text: Texts; - reads them from standard input, one on each line, and so does a pipe.
        base: Base model: hub id, local folder or kit-base; by default the one that the adapters name, where it is here.
        text_pair: The second text of each, for an adapter that was trained on pairs of texts.
        data: File of rows with text, perhaps text_pair, or words; labels are not needed, and an id is kept.
        out: File for the predictions, .csv or .jsonl; without it they are printed.
        top_k: Show this many of the most probable labels of each text.
        quantize: Load the base in nf4, nf4-double, fp4, fp4-double or int8.
        batch_size: Rows at once.
        max_length: Tokens of a text, at most; by default as in the training of the adapter.
    """
    from lora_kit.evaluation.predict import open_predictors
    from lora_kit.evaluation.prediction_file import check_prediction_file
    from lora_kit.generation.adapter_args import list_input_folders
    from lora_kit.models.infer_base import infer_base

    _check_flags(text or [], top_k, drop or [])
    texts = _collect_texts(text or [], data)
    base = base or infer_base(adapter or [], store=store)
    if out is not None:
        inputs = [*list_input_folders(base, adapter or [], store=store), *([data] if data else [])]
        check_prediction_file(out, replace=replace, inputs=inputs)
    loading: dict[str, Any] = {"store": store, "quantize": quantize, "allow": allow or ()}
    predictors_of = open_predictors(base, adapter or [None], batch_size=batch_size, max_length=max_length, **loading)
    with show_progress_lines(), show_row_progress() as on_progress, predictors_of as predictors:
        tasks = {each.task for each in predictors}
        rows = _read_rows(texts, text_pair or [], data, tasks, (rename or [], drop or []))
        forms = {each.name: _choose_form(each, top_k) for each in predictors}
        results = _predict_rows(predictors, rows, batch_size, lambda done: on_progress("rows", done, len(rows)))
        _write_results(results, forms, out, has_ids=bool(rows.ids), json=json)


def _check_flags(texts: Sequence[str], top_k: int | None, drop: Sequence[str]) -> None:
    """Raise ConfigError for a text that is a misspelled flag: a lone hyphen, which may be given, makes all parse."""
    if any(kind != "empty" for kind in drop):
        raise ConfigError(f"--drop {format_list(drop)} was given", hint="predict leaves out empty rows only: empty")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"--top-k must be at least 1; {top_k} was given")
    flag = next((text for text in texts if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", text)), None)
    if flag:
        raise ConfigError(f"predict has no option {flag}", hint="a text that looks like one goes through a pipe")


def _collect_texts(texts: list[str], data: Path | None) -> list[str]:
    """Return the texts that were given, or those on standard input.

    Raises:
        ConfigError: both texts and a file were given, or nothing.
    """
    from lora_kit.data.unlabeled_rows import read_unlabeled_lines, reason_likely_a_file

    if texts and data is not None:
        raise ConfigError("predict takes either texts or --data", hint="lora-kit predict --adapter mine 'a text'")
    if data is not None:
        return []
    is_piped = sys.stdin is not None and not sys.stdin.isatty()
    if texts == [_STANDARD_INPUT] or (not texts and is_piped):
        return read_unlabeled_lines(sys.stdin.buffer)
    if not texts:
        raise ConfigError("predict was given nothing to read", hint="give a text, or --data rows.jsonl")
    reason = reason_likely_a_file(texts[0]) if len(texts) == 1 else None
    if reason:
        raise ConfigError(reason, hint=f"--data {texts[0]} predicts its rows; printf %s NAME | takes it as a text")
    return texts


def _read_rows(
    texts: list[str], pairs: list[str], data: Path | None, tasks: set[str], flags: tuple[list[str], list[str]]
) -> UnlabeledRows:
    """Return the inputs that all tasks take: of several only texts, as a classifier takes two words for two texts.

    Args:
        flags: `--rename` and `--drop`, which are for a file.

    Raises:
        ConfigError: the second texts do not match the texts, or the rows are words and not only for task tokens.
        DataError: the file cannot be read; the message lists its lines.
    """
    from lora_kit.data.unlabeled_rows import PAIR_OF_WORDS, UnlabeledRows, read_unlabeled_rows
    from lora_kit.models.tasks import CLASSIFY, TOKENS

    if data is not None:
        if pairs:
            raise ConfigError("a second text goes with a text; a file has a column text_pair")
        task = TOKENS if TOKENS in tasks else CLASSIFY
        rename = parse_renames(flags[0], "rename", "Message=text")
        rows = read_unlabeled_rows(data, task, rename=rename, drop_empty=bool(flags[1]))
        if rows.left_out:
            count = len(rows.left_out)
            what = "1 row" if count == 1 else f"{count:,} rows"
            print(f"note: {what} of {data} without a text, left out", file=sys.stderr)
        if len(tasks) > 1 and not isinstance(rows.inputs[0], str):
            what = (
                f"{data} has words, which only task {TOKENS} takes; the adapters are for {format_list(sorted(tasks))}"
            )
            raise ConfigError(what, hint=f"name adapters of task {TOKENS} alone, or give rows with text")
        return rows
    if pairs and TOKENS in tasks:
        raise ConfigError(PAIR_OF_WORDS)
    if pairs and len(pairs) != len(texts):
        raise ConfigError(f"{len(texts)} texts and {len(pairs)} second texts were given", hint="give one for each")
    inputs = tuple(zip(texts, pairs, strict=True)) if pairs else tuple(texts)
    return UnlabeledRows(tuple(range(1, len(inputs) + 1)), inputs)


def _choose_form(predictor: Predictor, top_k: int | None) -> PredictionForm:
    from lora_kit.evaluation.prediction_file import PredictionForm
    from lora_kit.models.tasks import LABEL, LABEL_SET

    if top_k is not None and predictor.kind not in (LABEL, LABEL_SET):
        raise ConfigError(f"--top-k is for labels of texts; {predictor.name} predicts none")
    return PredictionForm(predictor.kind, min(top_k, len(predictor.labels)) if top_k else None)


def _predict_rows(
    predictors: Sequence[Predictor], rows: UnlabeledRows, batch_size: int, on_rows: Callable[[int], None]
) -> Results:
    """Yield predictions in the order of the rows, some batches at a time."""
    done = cut = 0
    size = _BATCHES_AT_ONCE * batch_size
    for start in range(0, len(rows), size):
        names, inputs = rows.name_rows()[start : start + size], rows.inputs[start : start + size]
        predicted = [{each.name: value for each, value in zip(predictors, row, strict=True)}
                     for row in zip(*(each.predict(inputs) for each in predictors), strict=True)]  # fmt: skip
        cut += sum(any(prediction.cut for prediction in row.values()) for row in predicted)
        yield from zip(names, inputs, predicted, strict=True)
        done += len(inputs)
        on_rows(done)
    if cut:
        print(f"note: {cut:,} of {len(rows):,} texts were too long and lost their end", file=sys.stderr)


def _write_results(
    results: Results, forms: dict[str, PredictionForm], out: Path | None, *, has_ids: bool, json: bool
) -> None:
    from lora_kit.evaluation.prediction_file import PredictionWriter
    from lora_kit.io.atomic_write import stage_file

    if out is not None:
        count = 0
        with stage_file(out) as staging, staging.open("w", encoding="utf-8", newline="") as file:
            writer = PredictionWriter(file, out.suffix, forms, has_ids=has_ids)
            for each in results:
                writer.write(*each)
                count += 1
        print_text(f"written: {out}, {count:,} rows")
    elif json:
        for row, given, predictions in results:
            for name, prediction in predictions.items():
                owner = {"adapter": name} if len(forms) > 1 else {}
                print(json_format.dumps({**owner, **row, **forms[name].to_json(given, prediction)}))
    else:
        _print_results(results, forms)


def _print_results(results: Results, forms: dict[str, PredictionForm]) -> None:
    """Print a table: of one adapter with a column for each figure, of several with a column for each adapter."""
    from lora_kit.evaluation.prediction_file import join_texts
    from lora_kit.models.tasks import LABEL_SET, WORD

    [form, *others] = forms.values()
    if not others and form.kind == WORD:
        _print_entities(results, form)
        return
    if not others and form.kind != LABEL_SET:
        rows = [row for _, given, each in results for value in each.values() for row in form.format_rows(given, value)]
        print_table(form.columns, [(_shorten(text), *cells) for text, *cells in rows])
        return
    header = ("text", *(forms if others else ("labels",)))
    print_table(
        header,
        [
            (_shorten(join_texts(given)), *(forms[n].describe(value) for n, value in each.items()))
            for _, given, each in results
        ],
    )


def _shorten(text: str) -> str:
    """Return a text for a table, each line cut to half of the screen: `--out` and `--json` have the whole text."""
    most = create_console().width // 2
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line if len(line) <= most else f"{line[: most - 1]}…" for line in lines)


def _print_entities(results: Results, form: PredictionForm) -> None:
    """Print a table with a row for each entity and the line of its text; a text without any has one as well."""
    rows: list[tuple[str, ...]] = []
    for row, given, predictions in results:
        for prediction in predictions.values():
            found = list(form.format_rows(given, prediction)) or [("(no entities)", "", "", "", "")]
            rows += [(str(row["line"]), *cells) for cells in found]
    print_table(("line", *form.columns), rows)
