"""Rows of preferences: which files they come from, what is refused, and the tokens of both answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_kit.data.encode import encode_rows, encode_with_faults
from lora_kit.data.preference_samples import build_preference_dataset
from lora_kit.data.preparation.prepare import prepare
from lora_kit.data.rows import read_rows
from lora_kit.data.sample_format import SampleFormat
from lora_kit.data.templates import chat_template
from lora_kit.errors import DataError
from lora_kit.evaluation.adapter_format import find_task
from lora_kit.training.recipe.load import load_recipe
from tests.support import texts


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = [say("user", "one"), say("assistant", "two"), say("user", "three")]
PAIR = {"prompt": "p ", "chosen": "good", "rejected": "bad one"}
WHOLE = {"chosen": [*ASKED, say("assistant", "yes")], "rejected": [*ASKED, say("assistant", "no")]}


def read(folder: Path, *rows: dict[str, Any]) -> Any:
    return read_rows(texts.write(folder / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        (PAIR, "preference"),
        (WHOLE, "chat-preference"),
        (
            {"prompt": ASKED, "chosen": [say("assistant", "yes")], "rejected": [say("assistant", "no")]},
            "chat-preference",
        ),
        (
            {"prompt": "hi", "chosen": [say("assistant", "yes")], "rejected": [say("assistant", "no")]},
            "chat-preference",
        ),
        ({"prompt": "p", "completion": "c", "label": True}, "feedback"),
        ({"prompt": ASKED, "completion": [say("assistant", "yes")], "label": False}, "chat-feedback"),
    ],
)
def test_the_columns_decide_the_format(row: dict[str, Any], row_format: str, tmp_path: Path) -> None:
    assert read(tmp_path, row).format == row_format


def test_one_prompt_in_three_layouts_gives_the_same_rows(tmp_path: Path) -> None:
    answers = {"chosen": [say("assistant", "yes")], "rejected": [say("assistant", "no")]}
    apart = read(tmp_path, {"prompt": ASKED, **answers})
    said_twice = read(tmp_path, {"prompt": "one", **WHOLE})
    assert read(tmp_path, WHOLE).values == apart.values == said_twice.values


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "rejected": ""}, "rejected: completion is empty"),
        ({**PAIR, "chosen": 3}, "chosen: completion must be a string"),
        ({**WHOLE, "rejected": [say("user", "other"), say("assistant", "no")]}, "differ before their last answer"),
        ({**WHOLE, "chosen": ASKED}, "the last message of chosen must be from the assistant"),
        ({**WHOLE, "rejected": "no"}, "rejected must be a list of messages"),
    ],
)
def test_a_row_that_says_no_preference_is_a_fault_of_its_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    first = PAIR if isinstance(row["chosen"], (str, int)) else WHOLE
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{message}"):
        read(tmp_path, first, row)


def test_a_csv_file_has_its_verdicts_as_words_or_numbers(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,label\na,b,True\nc,d,0\n", "utf-8")
    rows = read_rows(tmp_path / "rows.csv")
    assert rows.format == "feedback"
    assert [verdict for _, verdict in rows.values] == [True, False]
    texts.write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "label": True},
                                          {"prompt": "a", "completion": "b", "label": "maybe"}])  # fmt: skip
    with pytest.raises(DataError, match=r":2: label must be true or false; 'maybe' was given"):
        read_rows(tmp_path / "rows.jsonl")


def test_both_answers_follow_the_same_prompt_and_end(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    rows = read(tmp_path, PAIR)
    samples = encode_rows(rows, tokenizer, SampleFormat(max_length=32, separator="\n"))
    (item,) = [build_preference_dataset(rows, samples, unpaired=False)[0]]
    assert tokenizer.decode(item["prompt_ids"]).replace(" ", "") == "p\n"
    assert item["chosen_ids"] == [*tokenizer("good")["input_ids"], texts.EOS]
    assert item["rejected_ids"] == [*tokenizer("bad one")["input_ids"], texts.EOS]


def test_a_long_prompt_loses_the_same_tokens_for_both_answers(tmp_path: Path) -> None:
    rows = read(tmp_path, {"prompt": "abcdefghij", "chosen": "x", "rejected": "yyyy"})
    result = encode_with_faults(rows, texts.tokenizer(), SampleFormat(max_length=9, separator=""))
    item = build_preference_dataset(rows, result.encoded, unpaired=False)[0]
    assert item["prompt_ids"] == texts.tokenizer()("ghij")["input_ids"]
    assert len(item["chosen_ids"]) == 2
    assert len(item["rejected_ids"]) == 5
    assert result.cut == (1,)
    faults = encode_with_faults(rows, texts.tokenizer(), SampleFormat(max_length=4, separator="")).faults
    assert [fault.what for fault in faults] == ["rejected: the completion has 5 tokens and max_length is 4"]


def test_of_a_conversation_only_the_last_answer_counts(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    rows = read(tmp_path, WHOLE)
    template = chat_template("plain", tokenizer, base="tiny")
    samples = encode_rows(rows, tokenizer, SampleFormat(max_length=200, template=template))
    item = build_preference_dataset(rows, samples, unpaired=False)[0]
    assert item["chosen_ids"] == [*tokenizer("yes")["input_ids"], texts.EOS]
    assert item["rejected_ids"] == [*tokenizer("no")["input_ids"], texts.EOS]
    assert len(item["prompt_ids"]) > len("onetwothree")


def test_single_answers_of_two_come_in_turn_and_neighbors_share_no_prompt(tmp_path: Path) -> None:
    rows = read(tmp_path, *({"prompt": f"{n}", "chosen": "good", "rejected": "bad"} for n in range(4)))
    samples = encode_rows(rows, texts.tokenizer(), SampleFormat(max_length=32, separator=""))
    dataset = build_preference_dataset(rows, samples, unpaired=True)
    items = [dataset[index] for index in range(len(dataset))]
    assert [item["label"] for item in items] == [True, False, True, False, False, True, False, True]
    assert len({(tuple(item["prompt_ids"]), item["label"]) for item in items}) == 8
    good = texts.tokenizer()("good")["input_ids"]
    assert all((item["completion_ids"][:-1] == good) == item["label"] for item in items)


@pytest.mark.parametrize("row", [PAIR, WHOLE, {"prompt": "p", "completion": "c", "label": True}])
def test_prepare_writes_rows_that_are_read_as_they_were(row: dict[str, Any], tmp_path: Path) -> None:
    rows = [json.loads(json.dumps(row).replace('"one"', f'"one {n}"').replace('"p', f'"p{n} ')) for n in range(6)]
    rows = [{key.replace(f"p{n} ", "p"): value for key, value in each.items()} for n, each in enumerate(rows)]
    source = texts.write(tmp_path / "source.jsonl", rows)
    done = prepare(source, tmp_path / "made", base="kit-base", share=0.34)
    written = read_rows(tmp_path / "made" / "train.jsonl")
    assert written.format == read_rows(source).format
    assert set(written.values) <= set(read_rows(source).values)
    assert done.validation is not None
    recipe = load_recipe(tmp_path / "made" / "recipe.yaml")
    assert recipe.objective == ("kto" if "label" in row else "dpo")


def test_an_evaluation_refuses_rows_of_preferences_and_says_what_takes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"measured in training only \(objective: dpo, orpo, kto or reward"):
        find_task(read(tmp_path, PAIR))
