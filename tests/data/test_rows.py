"""Rows, tokens, labels and batches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import torch

from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset
from lora_kit.data.column_names import suggest_renames
from lora_kit.data.encode import encode
from lora_kit.data.rows import collect_label_names, read_rows, scan_rows
from lora_kit.errors import DataError
from lora_kit.models.prompt_tokens import render_prompt, tokenize_prompt
from tests.support import chats, texts

PAIRS = [{"prompt": "ab", "completion": "cd"}, {"prompt": "abcdef", "completion": "g"}]


def encoded(path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **settings: Any) -> EncodedDataset:
    found = read_rows(texts.write(path / "rows.jsonl", rows))
    return encode(found, tokenizer or texts.tokenizer(), **{"max_length": 32, **settings})


def unmasked(sample: dict[str, torch.Tensor]) -> list[int]:
    return [token for token in sample["labels"].tolist() if token != IGNORE_INDEX]


# Formats


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("Nachricht", "Kategorie"), "--rename Nachricht=text Kategorie=label"),
        (
            ("Cat\N{LATIN SMALL LETTER E WITH ACUTE}gorie", "avis"),
            "--rename avis=text 'Cat\N{LATIN SMALL LETTER E WITH ACUTE}gorie=label'",
        ),
        (("pregunta", "respuesta"), "--rename pregunta=prompt respuesta=completion"),
        (("Zeile", "Klasse"), "--rename Klasse=label Zeile=text"),
        (("A", "B"), "for texts with labels: lora-kit prepare rows.csv --rename A=text B=label; for answers: A=prompt"),
    ],
)
def test_two_columns_of_text_are_told_how_to_be_renamed(columns: tuple[str, str], hint: str) -> None:
    assert hint in (suggest_renames(Path("rows.csv"), dict.fromkeys(columns, "x")) or "")
    assert suggest_renames(Path("rows.csv"), {"A": "x", "B": 1}) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"text": "a", "label": "b"}, "label"),
        ({"text": "a", "label": 0}, "label"),
        ({"text": "a"}, "text"),
    ],
)
def test_the_format_is_found(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    assert read_rows(texts.write(tmp_path / "rows.jsonl", [row])).format == expected


def test_lines_are_counted_with_the_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    rows = read_rows(file)
    assert rows.values == (("a",), ("b",))
    assert rows.lines == (1, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', ":2: not JSON"),
        (b'["text"]', ":2: a JSON object was expected, found list"),
        (b'{"txt": "a"}', ":2: text missing"),
        (b'{"text": 3}', ":2: text must be a string; int was given"),
        (b'{"text": null}', ":2: text must be a string; NoneType was given"),
        (b'{"text": "  "}', ":2: text is empty"),
        (b'{"text": "a\xff"}', ":2: not UTF-8 at byte 11"),
        (b'{"text": "\\ud800"}', ":2: text holds half a surrogate pair"),
        (b'{"text": "a", "text": "b"}', ":2: the key 'text' appears twice"),
        (b"[" * 100_000, ":2: not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        read_rows(file)
    assert message in str(error.value)


def test_all_wrong_lines_are_told_at_once(tmp_path: Path) -> None:
    file = texts.write(tmp_path / "rows.jsonl", [{"text": "a"}, *[{"text": ""}] * 12])
    with pytest.raises(DataError) as error:
        read_rows(file)
    assert error.value.message == f"{file}:2: text is empty (so are lines 3, 4, 5 and 8 more)"
    texts.write(file, [{"text": "a"}, *[{"text": n} for n in ("", *[[0] * n for n in range(12)])], {"txt": "a"}])
    with pytest.raises(DataError) as error:
        read_rows(file)
    assert error.value.message.splitlines() == [
        "14 lines are not rows that can be used:",
        f"{file}:2: text is empty",
        f"{file}:3: text must be a string; list was given (so are lines 4, 5, 6 and 8 more)",
        f"{file}:15: text missing; the first row has it",
    ]


@pytest.mark.parametrize("label", [True, None, 1.5, "", [1]])
def test_a_label_is_a_word_or_a_whole_number(tmp_path: Path, label: Any) -> None:
    file = texts.write(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "a", "label": label}])
    with pytest.raises(DataError, match=":2: label"):
        read_rows(file)


def test_labels_of_two_kinds_are_refused(tmp_path: Path) -> None:
    file = texts.write(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "a", "label": 1}])
    with pytest.raises(DataError, match=":2: label is int, and str in the first row"):
        read_rows(file)


def test_a_file_without_rows_or_of_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        read_rows(texts.write(tmp_path / "rows.jsonl", []))
    with pytest.raises(DataError, match=r"keys question.*formats: prompt and completion"):
        read_rows(texts.write(tmp_path / "other.jsonl", [{"question": "a"}]))


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    texts.write(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        read_rows(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_rows(tmp_path)


def test_keys_that_are_not_used_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_rows(texts.write(tmp_path / "rows.jsonl", [{"text": "a", "id": 3}]))
    assert "not used: id" in caplog.text


# Layouts and kinds of files


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


HELLO = chats.conversation(("user", "hi"), ("assistant", "yo"))


@pytest.mark.parametrize(
    ("row", "layout", "value"),
    [
        ({"instruction": "add", "input": "1 2", "output": "3"}, "instruction", ("add\n\n1 2", "3")),
        ({"instruction": "add", "input": "", "output": "3"}, "instruction", ("add", "3")),
        ({"instruction": "add", "input": None, "output": "3"}, "instruction", ("add", "3")),
        ({"instruction": "add", "output": "3", "text": "both"}, "instruction", ("add", "3")),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
            "messages",
            (HELLO,),
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            "ShareGPT conversations",
            (HELLO,),
        ),
        (
            {"system": "be", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            "ShareGPT conversations",
            (chats.conversation(("system", "be"), ("user", "hi"), ("assistant", "yo")),),
        ),
        (
            {"conversations": [said("user", "hi"), said("assistant", "yo")]},
            "ShareGPT conversations",
            (HELLO,),
        ),
        (
            {"prompt": [said("user", "hi")], "completion": [said("assistant", "yo")]},
            "prompt and completion as messages",
            (HELLO,),
        ),
    ],
)
def test_layouts_become_formats(tmp_path: Path, row: dict[str, Any], layout: str, value: tuple[Any, ...]) -> None:
    rows = read_rows(texts.write(tmp_path / "rows.jsonl", [row]))
    assert (rows.layout, rows.values) == (layout, (value,))
    assert rows.format == ("completion" if isinstance(value[0], str) else "chat")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list; str was given"),
        ([], "no message is from the assistant"),
        ([said("user", "hi")], "no message is from the assistant"),
        ([said("user", "hi"), said("assistant", " ")], r"message 2 \(assistant\) is empty"),
        ([said("user", "hi"), said("assistant", None)], r"message 2 \(assistant\) must be a string"),
        (
            [said("user", "hi"), said("assistant", "yo", tool_calls=[{}])],
            r"message 2 \(assistant\): tool call 1: name must be",
        ),
        ([said("user", "hi"), said("assistant", "yo", weight=0)], "exclude every answer"),
        ([said("user", "hi"), said("robot", "3"), said("assistant", "yo")], "message 2 is from 'robot'"),
        ([said("user", "hi"), said("assistant", "yo"), said("system", "be")], "message 3 is from the system"),
        ([{"role": "user"}], "message 1 must have role and content"),
        ([said("user", [{"type": "text"}]), said("assistant", "yo")], "part 1 of the content must have type and text"),
        ([said("user", [{"type": "image"}]), said("assistant", "yo")], "is of type 'image'; only text"),
    ],
)
def test_a_wrong_conversation_is_named(tmp_path: Path, messages: Any, message: str) -> None:
    good = [said("user", "hi"), said("assistant", "yo")]
    with pytest.raises(DataError, match=f":2: .*{message}"):
        read_rows(texts.write(tmp_path / "rows.jsonl", [{"messages": good}, {"messages": messages}]))


def written(path: Path, contents: str | bytes) -> Path:
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_keeps_its_cells_as_written(tmp_path: Path, delimiter: str) -> None:
    lines = ["\ufefftext, label ", '"NA",007', "", '"two ""quoted""\nlines",1e5', ",,".replace(",,", ","), "last,x"]
    file = written(tmp_path / "rows.csv", "\r\n".join(lines).replace(",", delimiter))
    rows = read_rows(file)
    assert rows.values == (("NA", "007"), ('two "quoted"\nlines', "1e5"), ("last", "x"))
    assert rows.lines == (2, 4, 7)


def test_a_csv_names_the_lines_that_are_wrong(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.csv", 'prompt,completion\na,b\na\na,b,c\n"a"x,b\n,b\na,b\n"a,b\n')
    with pytest.raises(DataError) as error:
        read_rows(file)
    told = [line.removeprefix(f"{file}:") for line in str(error.value).splitlines()]
    assert told == [
        "5 lines are not rows that can be used:",
        "3: 1 cells, and the header has 2",
        "4: 3 cells, and the header has 2",
        "5: not CSV: ',' expected after '\"'",
        "6: prompt is empty",
        "8: not CSV: unexpected end of data",
    ]


def test_a_csv_may_have_long_cells_and_not_one_name_twice(tmp_path: Path) -> None:
    long = "a" * 200_000
    assert read_rows(written(tmp_path / "long.csv", f"text,n\n{long},1\n")).values == ((long,),)
    with pytest.raises(DataError, match=r"twice\.csv:1: the header has text twice"):
        read_rows(written(tmp_path / "twice.csv", "text,text\na,b\n"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "text\nfine\ncaf\u00e9\nwell\n"),
        ("rows.tsv", "text\nfine\ncaf\u00e9\nwell\n"),
        ("rows.txt", "fine\n\ncaf\u00e9\n\nwell\n"),
        ("rows.json", '[{"text": "fine"}, {"text": "caf\u00e9"}, {"text": "well"}]'),
        ("rows.jsonl", '{"text": "fine"}\n{"text": "caf\u00e9"}\n{"text": "well"}\n'),
    ],
)
def test_a_row_that_is_not_utf8_spoils_no_other(tmp_path: Path, name: str, text: str) -> None:
    found = scan_rows(written(tmp_path / name, text.encode("cp1252")))
    assert found.rows.values == (("fine",), ("well",))
    (fault,) = found.faults
    assert (fault.kind, fault.what.startswith("not UTF-8")) == ("bad", True)


def test_a_file_in_another_encoding_is_refused_with_the_way_to_read_it(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.csv", "text,n\na,1\ncaf\u00e9,2\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"rows\.csv:3: not UTF-8: byte 0xe9 in 'caf'… .*--encoding cp1252"):
        read_rows(file)
    header = written(tmp_path / "header.csv", "text,caf\u00e9\na,1\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"header\.csv:1: not UTF-8.*--encoding cp1252"):
        scan_rows(header)
    with pytest.raises(DataError, match=r"wide\.csv:1: not UTF-8.*--encoding utf-16"):
        scan_rows(written(tmp_path / "wide.csv", "text\na\n".encode("utf-16")))
    assert scan_rows(file, encoding="cp1252").rows.values == (("a",), ("caf\u00e9",))
    with pytest.raises(DataError, match="encoding 'klingon' is not known"):
        scan_rows(file, encoding="klingon")


def test_a_tsv_is_separated_by_tabs_alone(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path / "rows.tsv", "prompt\tcompletion\na, b; c\td\n"))
    assert rows.values == (("a, b; c", "d"),)


@pytest.mark.parametrize("indent", [None, 2])
def test_the_items_of_a_json_array_are_numbered(tmp_path: Path, indent: int | None) -> None:
    file = written(tmp_path / "rows.json", json.dumps([{"text": "a"}, {"text": "b\n"}, {"text": "c"}], indent=indent))
    rows = read_rows(file)
    assert rows.values == (("a",), ("b\n",), ("c",))
    assert rows.lines == (1, 2, 3)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ('[{"text": "a"},\n3]', ":2: a JSON object was expected, found int"),
        ('[{"text": "a"},\n{"text": ]', ":2: not JSON: .* at line 2, column 10; nothing after it can be read"),
        ('[{"text": "a"}\n{"text": "b"}]', ":1: not JSON: , or ] was expected after it in line 2"),
        ('[{"text": "a"},\n]', ":2: not JSON"),
        ('[{"text": "a"}', ":1: not JSON"),
        ('[{"text": "a"}]\n{}', ":2: there is text after the end"),
        ('[\n{"text": "a", "text": "b"}]', ":1: the key 'text' appears twice"),
        ("[" * 100_000, ":1: not JSON"),
        ("[]", "has no rows"),
    ],
)
def test_a_wrong_json_array_names_the_line(tmp_path: Path, contents: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(written(tmp_path / "rows.json", contents))


def test_jsonl_under_the_name_of_json_is_read(tmp_path: Path) -> None:
    assert read_rows(texts.write(tmp_path / "rows.json", [{"text": "a"}, {"text": "b"}])).lines == (1, 2)


def test_a_text_file_is_its_paragraphs(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path / "rows.txt", "\none\r\n two\r\n\r\n  \nthree\n"))
    assert rows.values == (("one\n two",), ("three",))
    assert rows.lines == (2, 6)


def test_parquet_is_read_with_its_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert (rows.values, rows.lines) == ((("a", "yes"), ("b", "no")), (1, 2))


def test_parquet_without_classes_names_rows_that_are_wrong(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a", None], "completion": ["b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet:2: prompt must be a string; NoneType was given"):
        read_rows(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="not Parquet"):
        read_rows(written(tmp_path / "torn.parquet", (tmp_path / "rows.parquet").read_bytes()[:100]))


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not read .*kinds: \.jsonl"):
        read_rows(written(tmp_path / "rows.xlsx", b"PK"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read_rows(tmp_path / "pipe.jsonl")


def test_a_scan_keeps_what_is_good_and_tells_the_rest_apart(tmp_path: Path) -> None:
    rows = [{"q": "a", "completion": "b"}, {"q": "", "completion": "b"}, {"q": 3, "completion": "b"}]
    found = scan_rows(texts.write(tmp_path / "rows.jsonl", rows), rename={"q": "prompt"})
    assert found.rows.values == (("a", "b"),)
    assert [(fault.line, fault.kind) for fault in found.faults] == [(2, "empty"), (3, "bad")]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"x": "prompt"}, "has no x to rename"),
        ({"q": "completion"}, "two columns would have the name completion"),
        ({"q": "prompt", "completion": "prompt"}, "two columns would have the name prompt"),
    ],
)
def test_columns_are_renamed_to_names_that_are_free(tmp_path: Path, rename: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan_rows(texts.write(tmp_path / "rows.jsonl", [{"q": "a", "completion": "b"}]), rename=rename)


def test_labels_are_sorted_numbers_by_size(tmp_path: Path) -> None:
    words = [{"text": "a", "label": label} for label in ("yes", "no", "yes")]
    numbers = [{"text": "a", "label": label} for label in (10, 9, 2)]
    assert collect_label_names(read_rows(texts.write(tmp_path / "a.jsonl", words))) == ("no", "yes")
    assert collect_label_names(read_rows(texts.write(tmp_path / "b.jsonl", numbers))) == ("2", "9", "10")
    table = tmp_path / "d.csv"
    table.write_text("text,label\n" + "".join(f"a,{number}\n" for number in (10, 2, 1, 0, -3)))
    assert collect_label_names(read_rows(table)) == ("-3", "0", "1", "2", "10")
    table.write_text("text,label\na,10\nb,9\nc,007\n")
    assert collect_label_names(read_rows(table)) == ("007", "10", "9"), "not all are numbers as they are written"
    with pytest.raises(DataError, match="every label is 'yes'"):
        collect_label_names(read_rows(texts.write(tmp_path / "c.jsonl", words[:1])))


# Tokens and labels


def test_the_loss_is_on_the_completion_and_eos(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer()
    sample = encoded(tmp_path, PAIRS, tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist()) == ["a", "b", "\n", "c", "d", "</s>"]
    assert sample["labels"].tolist()[:3] == [IGNORE_INDEX] * 3
    assert tokenizer.convert_ids_to_tokens(unmasked(sample)) == ["c", "d", "</s>"]


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_training_and_generation_see_one_prompt(tmp_path: Path, bos: str) -> None:
    tokenizer = texts.tokenizer(bos=bos)
    samples = encoded(tmp_path, PAIRS, tokenizer, separator=" = ")
    for row, sample in zip(PAIRS, samples, strict=True):
        prompt = tokenize_prompt(tokenizer, render_prompt(row["prompt"], separator=" = "))
        assert sample["input_ids"].tolist()[: len(prompt)] == prompt
        assert (sample["labels"] != IGNORE_INDEX).nonzero()[0].item() == len(prompt)


def test_bos_stands_once_even_if_the_text_brings_one(tmp_path: Path) -> None:
    rows = [{"prompt": "<s>ab", "completion": "c"}, {"prompt": "ab", "completion": "c</s>"}]
    samples = encoded(tmp_path, rows, texts.tokenizer(bos="<s>"))
    assert samples[0]["input_ids"].tolist() == samples[1]["input_ids"].tolist()
    assert samples[0]["input_ids"].tolist().count(texts.BOS) == 1
    assert samples[1]["input_ids"].tolist().count(texts.EOS) == 1


def test_eos_is_learned_though_it_is_the_pad_token(tmp_path: Path) -> None:
    tokenizer = texts.tokenizer(pad="")
    tokenizer.pad_token = tokenizer.eos_token
    samples = encoded(tmp_path, PAIRS, tokenizer)
    batch = Collator(tokenizer.pad_token_id)([samples[0], samples[1]])
    assert (batch["labels"] == texts.EOS).sum() == 2
    assert batch["attention_mask"].sum() == samples.lengths.sum()


@pytest.mark.parametrize("bos", ["", "<s>"])
def test_truncation_takes_the_prompt_from_its_left_and_keeps_the_completion(
    tmp_path: Path, bos: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = texts.tokenizer(bos=bos)
    sample = encoded(tmp_path, [{"prompt": "abcdefgh", "completion": "xyz"}], tokenizer, max_length=8)[0]
    words = tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
    assert words == (["<s>", "g", "h", "\n"] if bos else ["f", "g", "h", "\n"]) + ["x", "y", "z", "</s>"]
    assert tokenizer.convert_ids_to_tokens(unmasked(sample)) == ["x", "y", "z", "</s>"]
    assert "1 of 1 prompts were cut" in caplog.text


def test_a_completion_that_does_not_fit_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "a", "completion": "b" * 8}]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the completion has 9 tokens and max_length is 9"):
        encoded(tmp_path, rows, max_length=9)
    assert len(encoded(tmp_path, rows, max_length=10)) == 3


def test_every_token_of_a_text_but_the_first_is_predicted_once(tmp_path: Path) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    tokenizer = texts.tokenizer()
    whole = tokenizer(text)["input_ids"] + [texts.EOS]
    for max_length in range(2, 30):
        samples = encoded(tmp_path, [{"text": text}], tokenizer, max_length=max_length)
        assert [token for sample in samples for token in unmasked(sample)] == whole[1:]
        assert samples.lengths.max() <= max_length
        assert samples.num_labels == len(whole) - 1


def test_a_label_is_the_place_of_its_name(tmp_path: Path) -> None:
    rows = [{"text": "ab", "label": "yes"}, {"text": "abcdef", "label": "no"}]
    samples = encoded(tmp_path, rows, texts.bert_tokenizer(), label2id={"no": 0, "yes": 1}, max_length=5)
    assert [sample["labels"].item() for sample in samples] == [1, 0]
    assert samples[0]["input_ids"].tolist() == [texts.BOS, 4, 5, texts.EOS]
    assert samples[1]["input_ids"].tolist() == [texts.BOS, 4, 5, 6, texts.EOS]
    assert samples.num_labels == 2


def test_an_unknown_label_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "no"}, {"text": "a", "label": "maybe"}]
    with pytest.raises(DataError, match=":2: label 'maybe' is not one of no, yes"):
        encoded(tmp_path, rows, label2id={"no": 0, "yes": 1})


# Batches


def test_a_batch_is_padded_on_the_right(tmp_path: Path) -> None:
    samples = encoded(tmp_path, PAIRS)
    batch = Collator(texts.PAD)([samples[0], samples[1]])
    assert batch["input_ids"].shape == (2, 9)
    assert batch["input_ids"][0, 6:].tolist() == [texts.PAD] * 3
    assert batch["attention_mask"][0].tolist() == [1] * 6 + [0] * 3
    assert batch["labels"][0, 6:].tolist() == [IGNORE_INDEX] * 3


def test_the_first_token_never_has_a_label(tmp_path: Path) -> None:
    for rows in (PAIRS, [{"text": "abcdefgh"}]):
        for sample in encoded(tmp_path, rows, max_length=8):
            assert sample["labels"][0] == IGNORE_INDEX
