"""`predict`: what transformers says of the same texts, in every form, from Python and from the command line."""

from __future__ import annotations

import csv
import io
import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lora_kit as lk
from lora_kit.cli.main import main
from lora_kit.errors import ConfigError, DataError, LoraKitError
from lora_kit.evaluation.predict import Predictor, _split_words, _Words
from lora_kit.evaluation.prediction import Entity, Prediction
from tests.support import texts, tiny

Capture = pytest.CaptureFixture[str]
LABELS = {
    "single": ["no", "yes", "maybe"],
    "several": ["a", "b", "c"],
    "number": ["value"],
    "words": ["O", "B-P", "I-P"],
}
PROBLEMS = {"single": "single-label", "several": "multi-label", "number": "regression", "words": None}
TEXTS = ["ab", "a longer text", "b", "c and b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without a head, and an adapter for each kind of labels, whose head does something."""
    folder = tmp_path_factory.mktemp("predict")
    tiny.bert().bert.save_pretrained(folder / "base")
    texts.pair_tokenizer().save_pretrained(folder / "base")
    for name, labels in LABELS.items():
        task = "tokens" if name == "words" else "classify"
        base = lk.load_base(folder / "base", task=task, num_labels=len(labels))
        torch.manual_seed(1)
        config = lk.LoraConfig(
            r=2, lora_alpha=32, init_lora_weights=False, target_modules=("query", "value"),
            modules_to_save=("classifier",), task_type="TOKEN_CLS" if name == "words" else "SEQ_CLS",
        )  # fmt: skip
        bank = lk.attach(base.model, config, name=name)
        for parameter in bank.parameters(name):
            parameter.data.add_(torch.randn_like(parameter))
        record: dict[str, Any] = {"labels": labels}
        if name != "words":
            record["problem"] = PROBLEMS[name]
        if name == "several":
            record["thresholds"] = [0.2, 0.5, 0.9]
        bank.save(name, folder / name, record=record)
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def logits_of(name: str, *given: Any) -> torch.Tensor:
    """What transformers and PEFT make of one text: (classes,), or (length, classes)."""
    import peft

    task = "Token" if name == "words" else "Sequence"
    kind: Any = getattr(transformers, f"AutoModelFor{task}Classification")
    model = kind.from_pretrained("base", num_labels=len(LABELS[name]))
    model = peft.PeftModel.from_pretrained(model, name).eval()
    with torch.no_grad():
        inputs = transformers.AutoTokenizer.from_pretrained("base")(*given, return_tensors="pt")
        assert int(inputs["token_type_ids"].max()) == len(given) - 1
        return model(**inputs).logits[0]


def test_one_label_is_the_most_likely_of_transformers() -> None:
    found = lk.predict("base", "single", TEXTS, batch_size=3)
    for text, prediction in zip(TEXTS, found, strict=True):
        expected = logits_of("single", text).softmax(-1)
        assert list(prediction.probabilities) == LABELS["single"]
        torch.testing.assert_close(torch.tensor(list(prediction.probabilities.values())), expected)
        assert prediction.label == LABELS["single"][int(expected.argmax())]
        assert prediction.probability == max(prediction.probabilities.values())


def test_several_labels_are_those_at_their_thresholds() -> None:
    for text, prediction in zip(TEXTS, lk.predict("base", "several", TEXTS), strict=True):
        expected = logits_of("several", text).sigmoid()
        torch.testing.assert_close(torch.tensor(list(prediction.probabilities.values())), expected)
        chosen = expected >= torch.tensor([0.2, 0.5, 0.9])
        assert prediction.labels == tuple(name for name, has in zip("abc", chosen, strict=True) if has)


def test_a_number_is_the_output_of_the_head() -> None:
    for text, prediction in zip(TEXTS, lk.predict("base", "number", TEXTS), strict=True):
        assert prediction.value == pytest.approx(float(logits_of("number", text)), abs=1e-5)
        assert prediction.to_json() == {"value": prediction.value}


def test_two_texts_are_read_as_the_tokenizer_joins_them() -> None:
    (found,) = lk.predict("base", "single", [("ab", "cd")])
    torch.testing.assert_close(
        torch.tensor(list(found.probabilities.values())), logits_of("single", "ab", "cd").softmax(-1)
    )


def test_words_and_marks_are_found_in_a_text_and_entities_stand_where_they_say() -> None:
    (found,) = lk.predict("base", "words", ["Ann met  Bob, too."])
    (same,) = lk.predict("base", "words", [["Ann", "met", "Bob", ",", "too", "."]])
    assert found.labels == same.labels
    assert len(found.labels) == 6
    for entity in found.entities:
        assert "Ann met  Bob, too."[entity.start : entity.end] == entity.text
    for entity in same.entities:
        assert "Ann met Bob , too ."[entity.start : entity.end] == entity.text
    assert [(each.label, each.text.replace(" ", "")) for each in found.entities] == [
        (each.label, each.text.replace(" ", "")) for each in same.entities
    ]
    probabilities = logits_of("words", "Ann met Bob , too .").softmax(-1)
    assert found.labels[1] == LABELS["words"][int(probabilities[5].argmax())]


def test_signs_that_belong_to_a_letter_do_not_divide_words() -> None:
    decomposed = unicodedata.normalize("NFD", "prüfen")
    text = f"हिन्दी में {decomposed}, don't! สวัสดี می\u200cخواهم."
    found = [text[start:end] for start, end in _split_words(text)]
    assert found == ["हिन्दी", "में", decomposed, ",", "don", "'", "t", "!", "สวัสดี", "می\u200cخواهم", "."]
    (one,) = lk.predict("base", "words", [decomposed])
    assert len(one.labels) == 1


def test_entities_are_whole_and_as_sure_as_their_least_sure_word() -> None:
    predictor = object.__new__(Predictor)
    predictor.labels = ("O", "B-P", "I-P")
    text = _Words("Ann B. met Eve", ["Ann", "B.", "met", "Eve"], [0, 4, 7, 11])
    marked = list(predictor._mark_entities(text, ["B-P", "I-P", "O", None], [0.9, 0.6, 0.8, 0.0]))
    assert marked == [Entity("P", "Ann B.", 0, 6, 0.6)]


def test_the_order_and_the_batch_size_change_nothing() -> None:
    one = lk.predict("base", "single", TEXTS, batch_size=1)
    for size in (2, 16):
        for ours, theirs in zip(lk.predict("base", "single", TEXTS, batch_size=size), one, strict=True):
            assert ours.label == theirs.label
            assert ours.probability == pytest.approx(theirs.probability, abs=1e-5)
    assert lk.predict("base", "single", []) == []


def test_a_loaded_base_is_left_as_it_was() -> None:
    base = lk.load_base("base", task="classify", num_labels=3)
    before = {key: tensor.clone() for key, tensor in base.model.state_dict().items()}
    found = lk.predict(base, "single", TEXTS)
    assert [each.label for each in found] == [each.label for each in lk.predict("base", "single", TEXTS)]
    assert all(torch.equal(base.model.state_dict()[key], tensor) for key, tensor in before.items())
    assert lk.predict(base, None, TEXTS)[0].labels != ()


@pytest.mark.parametrize(
    ("adapter", "inputs", "error", "message"),
    [
        ("single", ["a", " "], DataError, "input 2 must be a text that is not empty"),
        ("single", ["a", ("b", "c")], DataError, "some inputs are pairs of texts"),
        ("single", [["a", "b"]], DataError, "input 1 must be a text, or two texts as a tuple; list was given"),
        ("single", "a text", DataError, "inputs must be a list; 'a text' was given"),
        ("single", None, DataError, "inputs must be a list; None was given"),
        ("words", [[]], DataError, "input 1 has no word"),
        ("absent", ["a"], LookupError, "absent"),
        (None, ["a"], ConfigError, r"base writes texts \(task causal-lm\); predict is for labels"),
    ],
)
def test_what_cannot_be_predicted_is_refused(adapter: Any, inputs: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        lk.predict("base", adapter, inputs)


@pytest.mark.parametrize("settings", [{"batch_size": "3"}, {"batch_size": 1.5}, {"max_length": True}])
def test_sizes_are_whole_numbers(settings: Any) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} .*a whole number"):
        lk.predict("base", "single", ["a"], **settings)


def test_a_text_that_is_too_long_says_so() -> None:
    short, long = lk.predict("base", "single", ["a", "a" * 99])
    assert (short.cut, long.cut) == (False, True)
    assert long.to_json()["cut"] is True


# The command line


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["predict", "--base", "base", *arguments])
    return code, *capsys.readouterr()


def test_a_text_gives_a_table(capsys: Capture) -> None:
    code, out, err = run(capsys, "-a", "single", "--text", "ab", "--text", "c and b")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()] == ["text", "ab", "c"]
    assert lk.predict("base", "single", ["ab"])[0].label in out.splitlines()[1]


def test_texts_are_given_as_words_of_the_command_or_on_standard_input(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(capsys, "-a", "single", "--text", "ab", "--text", "c and b")
    assert expected[0] == 0
    assert run(capsys, "ab", "c and b", "-a", "single") == expected
    for arguments in (["-"], []):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\r\n\nc and b")))
        assert run(capsys, *arguments, "-a", "single") == expected


@pytest.mark.parametrize(("given", "told"), [(b" \n", "no text"), (b"\xff", "not UTF-8")])
def test_standard_input_without_text_is_refused(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, given: bytes, told: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, _, err = run(capsys, "-a", "single")
    assert (code, told in err) == (2, True)


def test_the_name_of_a_file_is_not_taken_for_a_text(capsys: Capture, tmp_path: Path) -> None:
    rows = texts.write(tmp_path / "rows.jsonl", [{"text": "a"}])
    code, _, err = run(capsys, "-a", "single", str(rows))
    assert (code, "--data" in err) == (2, True)


def test_the_most_probable_labels_are_shown(capsys: Capture, tmp_path: Path) -> None:
    (found,) = lk.predict("base", "single", ["ab"])
    ranked = sorted(found.probabilities.items(), key=lambda pair: -pair[1])
    assert found.most_probable(2) == ranked[:2]
    code, out, _ = run(capsys, "ab", "-a", "single", "--top-k", "2", "--json")
    assert (code, json.loads(out)["probabilities"]) == (0, dict(ranked[:2]))
    code, out, _ = run(capsys, "ab", "-a", "single", "--top-k", "9")
    assert out.splitlines()[0].split()[1:] == ["label", "probability", "label_2", "probability_2", "label_3",
                                               "probability_3"]  # fmt: skip
    assert out.splitlines()[1].split()[1::2] == [name for name, _ in ranked]
    assert run(capsys, "ab", "-a", "number", "--top-k", "2")[0] == 2


def test_several_adapters_stand_side_by_side_whatever_they_predict(capsys: Capture, tmp_path: Path) -> None:
    names = ["single", "several", "number"]
    chosen = [part for name in names for part in ("-a", name)]
    code, out, err = run(capsys, "ab", *chosen)
    assert code == 0, err
    header, row = out.splitlines()
    assert header.split() == ["text", *names]
    one = lk.predict("base", "single", ["ab"])[0]
    assert f"{one.label} {one.probability:.2f}" in row
    rows = texts.write(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    out_file = tmp_path / "out.jsonl"
    assert run(capsys, *chosen, "--data", str(rows), "--out", str(out_file))[0] == 0
    lines = [json.loads(line) for line in out_file.read_text("utf-8").splitlines()]
    assert [line.pop("adapter") for line in lines] == names * len(TEXTS)
    for name in names:
        alone = tmp_path / f"{name}.jsonl"
        assert run(capsys, "-a", name, "--data", str(rows), "--out", str(alone))[0] == 0
        assert [json.loads(line) for line in alone.read_text("utf-8").splitlines()] == lines[names.index(name) :: 3]
    code, _, err = run(capsys, *chosen, "--data", str(rows), "--out", str(tmp_path / "out.csv"))
    assert (code, "name the file .jsonl" in err, (tmp_path / "out.csv").exists()) == (2, True, False)


@pytest.mark.parametrize("names", [("words", "single"), ("single", "words")])
def test_a_classifier_beside_a_tagger_gets_no_words_for_a_pair_of_texts(
    capsys: Capture, tmp_path: Path, names: tuple[str, str]
) -> None:
    chosen = [part for name in names for part in ("-a", name)]
    for row in ({"words": ["Anna", "went"]}, {"words": ["Anna", "went"], "text": "Anna went"}):
        rows = texts.write(tmp_path / "words.jsonl", [row])
        code, out, err = run(capsys, *chosen, "--data", str(rows))
        assert (code, out, "has words, which only task tokens takes" in err) == (2, "", True)
    code, out, err = run(capsys, *chosen, "ab c")
    assert (code, out.split()[:3]) == (0, ["text", *names]), err


@pytest.mark.parametrize("names", [("words",), ("single", "words")])
def test_a_tagger_refuses_a_second_text_as_an_argument_and_as_a_column(
    capsys: Capture, tmp_path: Path, names: tuple[str, ...]
) -> None:
    chosen = [part for name in names for part in ("-a", name)]
    rows = texts.write(tmp_path / "rows.jsonl", [{"text": "a", "text_pair": "b"}])
    for given in (["a", "--text-pair", "b"], ["--data", str(rows)]):
        code, _, err = run(capsys, *chosen, *given)
        assert (code, "text_pair is for task classify; words are found in one text" in err) == (2, True)


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink"])
def test_predictions_never_replace_the_file_that_is_read(capsys: Capture, tmp_path: Path, link: str) -> None:
    rows = texts.write(tmp_path / "rows.jsonl", [{"text": "a"}])
    before, out = rows.read_bytes(), tmp_path / ("rows.jsonl" if link == "same" else "other.jsonl")
    if link == "symlink":
        out.symlink_to(rows)
    elif link == "hardlink":
        out.hardlink_to(rows)
    code, _, err = run(capsys, "-a", "single", "--data", str(rows), "--out", str(out), "--replace")
    assert (code, "is an input" in err, rows.read_bytes() == before) == (3, True, True)


def test_a_table_of_entities_names_the_line_and_texts_without_any(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Prediction(labels=("O", "B-P"), entities=(Entity("P", "Anna", 3, 7, 0.5),))
    given = iter([Prediction(labels=("O",)), found])
    monkeypatch.setattr(Predictor, "predict", lambda self, inputs: [next(given) for _ in inputs])
    rows = texts.write(tmp_path / "rows.jsonl", [{"text": "ab"}, {"text": "ab Anna"}])
    code, out, err = run(capsys, "-a", "words", "--data", str(rows))
    assert code == 0, err
    assert [line.split() for line in out.splitlines()] == [
        ["line", "text", "label", "start", "end", "probability"],
        ["1", "(no", "entities)"],
        ["2", "Anna", "P", "3", "7", "0.5000"],
    ]


def test_adapters_with_the_same_labels_share_one_base(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kit.evaluation import predict as module

    loaded: list[object] = []
    load = module.load_for_labels
    monkeypatch.setattr(module, "load_for_labels", lambda *a, **k: loaded.append(a) or load(*a, **k))
    with module.open_predictors("base", ["single", "number", "single"]) as opened:
        assert [each.name for each in opened] == ["single", "number", "single"]
    assert len(loaded) == 2


def test_a_table_as_people_have_it_is_predicted(capsys: Capture, tmp_path: Path) -> None:
    """In cp1252, with columns of other names, an empty cell, and numbers of tickets that stay beside the texts."""
    umlaut = "\N{LATIN SMALL LETTER U WITH DIAERESIS}"
    rows = tmp_path / "tickets.csv"
    lines = ["Nr;Nachricht;Kunde", f"A7;T{umlaut}r klemmt;Weber", "A8; ;Weber", "A9;Wo ist es?;Kohl", ""]
    rows.write_bytes("\r\n".join(lines).encode("cp1252"))
    asked = ["-a", "single", "--data", str(rows)]
    code, _, err = run(capsys, *asked)
    assert (code, "no column text; it has Kunde, Nachricht, Nr (--rename Nachricht=text)" in err) == (2, True)
    asked += ["--rename", "Nachricht=text", "Nr=id"]
    code, _, err = run(capsys, *asked)
    assert (code, "tickets.csv:3: text is empty (--drop empty leaves these rows out)" in err) == (2, True)
    code, _, err = run(capsys, *asked, "--drop", "empty", "--out", str(tmp_path / "out.csv"))
    assert (code, "note: 1 row of" in err) == (0, True)
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        table = [(row["line"], row["id"], row["text"]) for row in csv.DictReader(file)]
    assert table == [("2", "A7", f"T{umlaut}r klemmt"), ("4", "A9", "Wo ist es?")]
    code, _, err = run(capsys, *asked, "--drop", "long")
    assert (code, "predict leaves out empty rows only" in err) == (2, True)


@pytest.mark.parametrize("name", list(LABELS))
def test_a_file_gives_csv_and_jsonl(capsys: Capture, tmp_path: Path, name: str) -> None:
    rows = texts.write(tmp_path / "rows.jsonl", [{"text": text, "id": 7} for text in TEXTS])
    for suffix in ("csv", "jsonl"):
        out = tmp_path / f"{name}.{suffix}"
        code, said, err = run(capsys, "-a", name, "--data", str(rows), "--out", str(out), "--batch-size", "1")
        assert code == 0, err
        assert "4 rows" in said
    found = lk.predict("base", name, TEXTS, batch_size=1)
    lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 4]
    assert [line["text"] for line in lines] == TEXTS
    assert {line["id"] for line in lines} == {7}
    assert [{key: value for key, value in line.items() if key not in ("line", "text", "id")} for line in lines] == [
        each.to_json() for each in found
    ]
    with (tmp_path / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    if name == "single":
        assert [row["label"] for row in table] == [each.label for each in found]
    elif name == "several":
        assert [tuple(json.loads(row["labels"])) for row in table] == [each.labels for each in found]
    elif name == "number":
        assert [float(row["value"]) for row in table] == pytest.approx([each.value for each in found], rel=1e-5)
    else:
        assert [row["label"] for row in table] == [entity.label for each in found for entity in each.entities]


def test_what_is_wrong_is_one_line_and_writes_nothing(capsys: Capture, tmp_path: Path) -> None:
    rows = texts.write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": ""}, {"txt": "b"}])
    code, _, err = run(capsys, "-a", "single", "--data", str(rows), "--out", str(tmp_path / "out.csv"))
    assert (code, ":2: text is empty" in err, ":3: text is expected; the row has txt" in err) == (2, True, True)
    assert not (tmp_path / "out.csv").exists()
    assert run(capsys, "-a", "single", "a", "--data", str(rows))[0] == 2
    code, _, err = run(capsys, "-a", "single", "a", "--topk", "2")
    assert (code, "no option --topk" in err) == (2, True)
    code, _, err = run(capsys, "-a", "single", "--data", str(rows), "--out", str(tmp_path / "out.txt"))
    assert (code, "name it .csv or .jsonl" in err) == (2, True)


def test_a_run_that_fails_in_the_middle_leaves_the_file_that_was_there(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kit.evaluation.predict import Predictor

    rows = texts.write(tmp_path / "rows.jsonl", [{"text": "a"}] * 40)
    out = tmp_path / "out.csv"
    out.write_text("mine", encoding="utf-8")
    right, calls = Predictor.predict, []

    def fail_late(self: Predictor, inputs: Any) -> list[Prediction]:
        calls.append(len(inputs))
        if len(calls) == 2:
            raise LoraKitError("enough")
        return right(self, inputs)

    monkeypatch.setattr(Predictor, "predict", fail_late)
    code, _, _ = run(capsys, "-a", "single", "--data", str(rows), "--out", str(out), "--batch-size", "1", "--replace")
    assert (code, calls, out.read_text("utf-8")) == (2, [16, 16], "mine")
    assert [path.name for path in tmp_path.iterdir() if path.name != "rows.jsonl"] == ["out.csv"]


def test_a_head_that_the_adapter_brings_is_not_called_new(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_kit"):
        lk.predict("base", "single", ["ab"])
        assert not [message for message in caplog.messages if "new head" in message]
        lk.load_base("base", task="classify", num_labels=3)
    assert [message for message in caplog.messages if "new head" in message]


def test_a_long_text_leaves_the_table_a_table(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    long = "a word " * 60
    assert main(["predict", "-a", "single", long, "ab"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["text", "label", "probability"]
    assert "…" in first
    assert len(first) <= 80
    assert second.startswith("ab ")
    assert main(["predict", "-a", "single", long, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == long
