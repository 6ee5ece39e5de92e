"""Rows with labels: lists, numbers, pairs and weights; what they are to a classifier; what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kit.data.batches import Collator
from lora_kit.data.encode import encode
from lora_kit.data.label_problem import list_label_names, resolve_problem
from lora_kit.data.rows import Rows, read_rows
from lora_kit.data.text_tokens import tokenize_texts
from lora_kit.errors import DataError
from tests.support import texts
from tests.support.problems import NUMBERS, SETS, SINGLE


def rows_of(folder: Path, rows: list[dict[str, Any]]) -> Rows:
    return read_rows(texts.write(folder / "rows.jsonl", rows))


def table(folder: Path, text: str) -> Rows:
    (folder / "rows.csv").write_text(text, encoding="utf-8")
    return read_rows(folder / "rows.csv")


def test_the_form_of_the_labels_decides_the_problem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for rows, problem, names in (
        (SETS, "multi-label", ("a", "b", "c")),
        (SINGLE, "single-label", ("x", "y", "z")),
        (NUMBERS, "regression", ("value",)),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 1}], "single-label", ("0", "1")),
    ):
        found = rows_of(tmp_path, rows)
        assert resolve_problem(found, None) == problem
        assert list_label_names(found, problem) == names
    assert "predicted as numbers: problem: regression" in caplog.text
    assert caplog.records[-1].levelno == logging.WARNING


def test_a_table_has_numbers_and_lists_too(tmp_path: Path) -> None:
    assert resolve_problem(table(tmp_path, "text,label\na,1\nb,2.5\n"), None) == "regression"
    assert resolve_problem(table(tmp_path, "text,label\na,1.1.0\nb,2.5\n"), None) == "single-label"
    found = table(tmp_path, 'text,labels\na,"[""x"", ""y""]"\nb,[]\n')
    assert found.values == (("a", ("x", "y")), ("b", ()))
    assert resolve_problem(found, None) == "multi-label"


def test_what_may_be_classes_as_well_as_numbers_is_to_be_named(tmp_path: Path) -> None:
    thirty = [{"text": f"text {number}", "label": 7 * number} for number in range(30)]
    with pytest.raises(DataError, match=r"30 rows have 30 different numbers as labels, which looks like a regression"):
        resolve_problem(rows_of(tmp_path, thirty), None)
    assert resolve_problem(rows_of(tmp_path, thirty), "regression") == "regression"
    assert resolve_problem(rows_of(tmp_path, thirty), "single-label") == "single-label"
    whole = [{"text": "a", "label": 1.0}, {"text": "b", "label": 2.0}]
    with pytest.raises(DataError, match=r"numbers such as 1\.0 \(problem: regression, or problem: single-label"):
        resolve_problem(rows_of(tmp_path, whole), None)


@pytest.mark.parametrize(
    ("rows", "problem", "message"),
    [
        (SINGLE, "regression", r":1: label must be a number for problem regression; 'x' was given .*\n.*:2:"),
        (SINGLE, "multi-label", "takes a column labels with a list in each row"),
        (SETS, "single-label", r"lists several labels \(problem: multi-label\)"),
        ([{"text": "a", "labels": []}], "multi-label", "no row has a label"),
    ],
)
def test_labels_of_another_form_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], problem: str, message: str
) -> None:
    found = rows_of(tmp_path, rows)
    with pytest.raises(DataError, match=message):
        list_label_names(found, resolve_problem(found, problem))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "labels": "x"}, r"labels must be a list; str was given \(one label: the column label\)"),
        ({"text": "a", "labels": [0, 1, 0]}, "labels has 0 twice; it lists the labels that apply, not a 0 or 1"),
        ({"text": "a", "labels": [0.0, 1.0]}, "labels 1 must be a string or a whole number; float"),
        ({"text": "a", "labels": "[a"}, "labels must be a list as JSON writes it"),
        ({"text": "a", "labels": ["x"], "weight": 0}, "weight must be a number above 0; 0 was given"),
        ({"text": "a", "labels": ["x"], "weight": True}, "weight must be a number above 0; True was given"),
        ({"text": "a", "labels": ["x"], "text_pair": " "}, "text_pair is empty"),
        ({"text": "a", "labels": ["x"], "text_pair": "b"}, "text_pair is given; the first row has none"),
        ({"text": "a", "labels": [1]}, "label is int, and str in the first row"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f":2: {message}"):
        rows_of(tmp_path, [SETS[0], row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "x", "labels": ["y"]}, "text and label, which does not read labels"),
        ({"text": "a", "text_pair": "b"}, "text, which does not read text_pair"),
        ({"text": "a", "weight": 2}, "text, which does not read weight"),
        ({"prompt": "a", "completion": "b", "weight": 2}, "which does not read weight"),
        ({"words": ["a"], "labels": ["O"], "text_pair": "b"}, "which does not read text_pair"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "which does not read history"),
        ({"prompt": "a", "completion": "b", "system": "be kind"}, "which does not read system"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "be kind"}, "which does not read system"),
    ],
)
def test_a_column_that_would_change_what_is_learned_is_not_passed_over(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path, [row])


def test_words_may_have_a_weight_under_either_names_of_their_columns(tmp_path: Path) -> None:
    for words, labels in (("words", "labels"), ("tokens", "ner_tags")):
        rows = [{words: ["a", "b"], labels: ["O", "P"], "weight": weight} for weight in (2, None)]
        assert rows_of(tmp_path, rows).values == ((("a", "b"), ("O", "P"), 2.0), (("a", "b"), ("O", "P")))
        with pytest.raises(DataError, match=":1: weight must be a number above 0"):
            rows_of(tmp_path, [{words: ["a"], labels: ["O"], "weight": -1}])


def test_an_empty_column_changes_nothing(tmp_path: Path) -> None:
    """Parquet has every column in every row."""
    rows = [{"text": "a", "label": "x", "labels": None, "text_pair": None, "weight": None}]
    assert rows_of(tmp_path, rows).values == (("a", "x"),)
    rows = [{"prompt": "a", "completion": "b", "system": "", "history": []}]
    assert rows_of(tmp_path, rows).values == (("a", "b"),)
    assert rows_of(tmp_path, [{"text": "a", "label": "x", "system": "Linux"}]).values == (("a", "x"),)


@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize("max_length", [6, 7, 8, 9, 10, 11, 64])
def test_a_pair_is_what_the_tokenizer_makes_of_it(max_length: int, types: bool) -> None:
    tokenizer = texts.pair_tokenizer(types=types)
    pairs = [("abcd", "efg"), ("ab", "cdefgh"), ("abcdef", "g"), ("abc", "def"), ("a", "b")]
    for pair, ours in zip(pairs, tokenize_texts(pairs, tokenizer, max_length=max_length), strict=True):
        theirs = tokenizer(*pair, truncation="longest_first", max_length=max_length)
        assert ours.ids == theirs["input_ids"]
        assert ours.types == theirs.get("token_type_ids")
        assert ours.is_cut == (len(tokenizer(*pair)["input_ids"]) > max_length)


def test_a_pair_without_room_for_both_is_refused() -> None:
    with pytest.raises(DataError, match="max_length 4 leaves no token for each of two texts"):
        list(tokenize_texts([("a", "b")], texts.pair_tokenizer(), max_length=4))


def test_a_tokenizer_that_knows_no_pairs_gets_a_line_break_between_them() -> None:
    tokenizer = texts.tokenizer()
    (ours,) = tokenize_texts([("ab", "c")], tokenizer, max_length=64)
    assert tokenizer.decode(ours.ids) == tokenizer.decode(tokenizer("ab\nc")["input_ids"])
    assert ours.types is None
    tokenizer = texts.bert_tokenizer()  # puts special tokens around one text, and none around two
    (ours,) = tokenize_texts([("ab", "c")], tokenizer, max_length=64)
    assert ours.ids == tokenizer("ab\nc")["input_ids"]


def test_pairs_are_padded_with_their_types(tmp_path: Path) -> None:
    rows = [{"text": "a", "text_pair": "bcd", "label": "x"}, {"text": "a", "text_pair": "b", "label": "y"}]
    samples = encode(rows_of(tmp_path, rows), texts.pair_tokenizer(), max_length=64, label2id={"x": 0, "y": 1})
    batch = Collator(texts.PAD)([samples[1], samples[0]])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    chosen = samples.select([1])
    assert torch.equal(chosen[0]["token_type_ids"], samples[1]["token_type_ids"])
    assert chosen.labels.tolist() == [1]


def test_a_label_that_is_not_trained_on_is_refused_with_its_line(tmp_path: Path) -> None:
    found = rows_of(tmp_path, [*SETS, {"text": "q", "labels": ["a", "q"]}])
    with pytest.raises(DataError, match=r":6: label 'q' is not one of a, b, c"):
        encode(found, texts.bert_tokenizer(), max_length=64, label2id={"a": 0, "b": 1, "c": 2}, problem="multi-label")
