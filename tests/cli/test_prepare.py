"""`prepare` and `preview`: from a messy file to an adapter with no file edited by hand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_kit.cli.main import main
from lora_kit.data.rows import read_rows
from tests.support import texts, tiny

Capture = pytest.CaptureFixture[str]
LABEL_B = '""b"", '
MENDED = ["--rename", "Question=prompt", "Answer=completion"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny base and a spreadsheet as people save it."""
    monkeypatch.chdir(tmp_path)
    tiny.llama().save_pretrained("base")
    texts.tokenizer().save_pretrained("base")
    lines = ["id;Question;Answer", *(f'{n};ask {n};"say; {n}"' for n in range(12)), "7;ask 7;say; 7", "8;;nothing"]
    lines += ['9;"ask 9";"say; 9"', "10;caf\N{LATIN SMALL LETTER E WITH ACUTE};yes", f"11;long;{'a' * 80}"]
    Path("messy.csv").write_bytes("\r\n".join(lines).encode("cp1252"))
    return tmp_path


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    return code, *capsys.readouterr()


def test_from_a_messy_csv_to_an_answer_with_no_file_edited(here: Path, capsys: Capture) -> None:
    code, _, err = run(capsys, "prepare", "messy.csv", "--base", "base")
    assert (code, "lora-kit prepare messy.csv --rename Question=prompt Answer=completion" in err) == (2, True)
    as_utf8 = [*MENDED, "--encoding", "utf-8"]
    code, _, err = run(capsys, "prepare", "messy.csv", "--base", "base", *as_utf8)
    assert (code, "--encoding cp1252" in err, "--drop bad" in err) == (2, True, True)
    code, out, _ = run(capsys, "prepare", "messy.csv", "--base", "base", *as_utf8, "--drop", "bad")
    assert (code, "line 17: not UTF-8: byte 0xe9 in 'caf'…" in out.replace("\n", "")) == (0, True)

    code, out, err = run(capsys, "prepare", "messy.csv", "--base", "base", *MENDED)
    assert (code, err) == (0, "")
    assert "17 rows: prompt and completion" in out
    assert ["encoding", "cp1252"] in [line.split() for line in out.splitlines()]
    assert "line 14: 4 cells, and the header has 3" in out
    assert "line 15: prompt is empty" in out
    assert "line 16, see 11" in out
    assert "line 18: the completion has 81 tokens" in out
    assert "nothing was written" in out

    code, out, err = run(capsys, "prepare", "messy.csv", "--base", "base", *MENDED, "--out", "data/faq")
    assert code == 2
    assert "--drop bad empty long" in err
    assert not Path("data").exists()

    drop = ["--drop", "bad", "empty", "long", "duplicates"]
    code, out, err = run(capsys, "prepare", "messy.csv", "--base", "base", *MENDED, "--out", "data/faq", *drop)
    assert (code, err) == (0, "")
    assert "13 rows to train on, 0 to validate on" in out
    assert "nothing is validated on: with so few rows, give --validation FILE" in out
    commands = [line.split()[1:] for line in out.splitlines() if line.startswith("  lora-kit ")]
    assert [command[0] for command in commands] == ["preview", "train"]

    code, out, _ = run(capsys, *commands[0])
    assert code == 0
    assert out.splitlines()[0].startswith("  'a s k")
    assert out.splitlines()[1].startswith("+ 's a y ;")
    assert "tokens are learned" in out.splitlines()[2]

    code, _, err = run(capsys, *commands[1], "--train.max_steps", "2")
    assert code == 0, err
    code, out, err = run(capsys, "generate", "--base", "base", "--adapter", "faq", "--prompt", "ask 3")
    assert code == 0, err


def test_a_preview_of_a_conversation_shows_what_is_learned(here: Path, capsys: Capture) -> None:
    chat = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}
    texts.write(here / "chat.jsonl", [chat, {**chat, "system": "be"}])
    arguments = ["--base", "base", "--out", "data/chat", "--share", "0"]
    code, out, err = run(capsys, "prepare", "chat.jsonl", *arguments)
    assert (code, err) == (0, "")
    assert "base has no chat template of its own: the recipe says plain" in out
    code, out, _ = run(capsys, "preview", "data/chat/recipe.yaml", "--row", "2")
    assert code == 0
    sample, _, command = out.partition("\n\nnext:\n")
    *spans, summary = sample.splitlines()
    assert [line[0] for line in spans] == [" ", "+"]
    assert spans[1] == "+ 'y o </s>'"
    assert summary.startswith("3 of ")
    assert command == "  lora-kit train data/chat/recipe.yaml\n"
    code, shown, _ = run(capsys, "preview", "data/chat/recipe.yaml", "--row", "2", "--json")
    told = json.loads(shown)
    assert told["summary"] == summary
    spans = [(span["learned"], span["text"]) for sample in told["samples"] for span in sample]
    assert [learned for learned, _ in spans] == [False, True]
    assert spans[1][1] == "y o </s>"


def test_labels_are_shown_with_their_shares(here: Path, capsys: Capture) -> None:
    rows = [{"text": f"text {n}", "label": "spam" if n % 4 else "ham"} for n in range(16)]
    base = ["--base", "base", "--out", "d", "--share", "0.1"]
    code, out, _ = run(capsys, "prepare", str(texts.write(here / "rows.jsonl", rows)), *base)
    assert code == 0
    assert "2 rows to validate on say little: one row is 50%" in out
    assert [line.split() for line in out.splitlines() if line.endswith("%")] == [
        ["spam", "12", "75.0%"],
        ["ham", "4", "25.0%"],
    ]
    code, out, _ = run(capsys, "preview", "d/recipe.yaml", "--validation")
    assert code == 0
    assert out.partition("\n\nnext:")[0].endswith(("label spam", "label ham"))


def test_json_holds_what_the_manifest_holds(here: Path, capsys: Capture) -> None:
    rows = [{"prompt": f"ask {n}", "completion": "x"} for n in range(9)]
    texts.write(here / "rows.jsonl", rows)
    code, out, _ = run(capsys, "prepare", "rows.jsonl", "--base", "base", "--out", "d", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(Path("d/manifest.json").read_text())


def test_names_in_a_file_cannot_steer_the_terminal(here: Path, capsys: Capture) -> None:
    texts.write(here / "rows.jsonl", [{"text": "a\x1b[2J", "\x1b[31mkey": 1}, {"text": "b"}, {"text": ""}])
    code, out, _ = run(capsys, "prepare", "rows.jsonl", "--base", "base")
    assert code == 0
    assert "\\x1b[31mkey" in out
    texts.write(here / "good.jsonl", [{"text": "a\x1b[2J"}, {"text": "b"}])
    run(capsys, "prepare", "good.jsonl", "--base", "base", "--out", "d", "--share", "0")
    assert "\x1b" not in out + run(capsys, "preview", "d/recipe.yaml")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nothing.csv"], "no such file"),
        (["prepare", "messy.csv", "--rename", "Question"], "is not old=new"),
        (["prepare", "messy.csv", "--drop", "everything"], "drop everything is not known"),
        (["prepare", "messy.csv", "--share", "2"], "share for validation"),
        (["prepare", "messy.xlsx"], "no such file"),
        (["preview", "nothing.yaml"], "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(here: Path, arguments: list[str], message: str, capsys: Capture) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_preview_of_a_row_that_is_not_there_is_refused(here: Path, capsys: Capture) -> None:
    texts.write(here / "rows.jsonl", [{"text": "a b"}, {"text": "c d"}])
    run(capsys, "prepare", "rows.jsonl", "--base", "base", "--out", "d", "--share", "0")
    for row in ("0", "3"):
        code, _, err = run(capsys, "preview", "d/recipe.yaml", "--row", row)
        assert (code, f"row {row} was asked for" in err) == (2, True)
    code, _, err = run(capsys, "preview", "d/recipe.yaml", "--validation")
    assert (code, "has no data.validation" in err) == (2, True)


def test_spellings_of_a_label_are_offered_and_renamed_together(here: Path, capsys: Capture) -> None:
    labels = ["refund"] * 3 + ["Refund", "refund "] + ["card"] * 3
    texts.write(here / "rows.jsonl", [{"text": f"t{number}", "label": label} for number, label in enumerate(labels)])
    code, out, _ = run(capsys, "prepare", "rows.jsonl", "--base", "base")
    offer = "in case, blanks or umlauts: 'Refund' is 'refund', 'refund ' is 'refund': --relabel auto"
    assert (code, offer in out) == (0, True)
    code, out, _ = run(capsys, "prepare", "rows.jsonl", "--base", "base", "--relabel", "auto")
    assert (code, "relabeled: 'Refund' is 'refund', 'refund ' is 'refund'" in out, "differ only" in out) == (
        0,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("header", "rows", "problem"),
    [
        ("text,labels", [f'row {n},"[{["", LABEL_B][n % 2]}""a""]"' for n in range(30)], "multi-label"),
        ("text,label", [f"row {n},{n}.5" for n in range(30)], "regression"),
        ("text,text_pair,label,weight", [f"row {n},pair {n},{'xy'[n % 2]},{1 + n}" for n in range(30)], "single-label"),
    ],
)  # fmt: skip
def test_a_table_of_texts_with_labels_becomes_a_recipe_that_can_be_previewed(
    here: Path, capsys: Capture, header: str, rows: list[str], problem: str
) -> None:
    Path("rows.csv").write_text("\n".join([header, *rows]), encoding="utf-8")
    code, _, err = run(capsys, "prepare", "rows.csv", "--base", "base", "--out", "data/rows")
    assert code == 0, err
    recipe = yaml.safe_load(Path("data/rows/recipe.yaml").read_text("utf-8"))
    assert (recipe["task"], recipe["problem"]) == ("classify", problem)
    written = read_rows("data/rows/train.jsonl").values + read_rows("data/rows/validation.jsonl").values
    assert sorted(written) == sorted(read_rows("rows.csv").values)
    code, out, err = run(capsys, "preview", "data/rows/recipe.yaml")
    assert code == 0, err
    assert ", label " in out


def test_whole_numbers_that_may_be_classes_are_asked_about(here: Path, capsys: Capture) -> None:
    Path("rows.csv").write_text("text,label\n" + "\n".join(f"row {n},{n}" for n in range(30)), encoding="utf-8")
    code, _, err = run(capsys, "prepare", "rows.csv", "--base", "base")
    assert (code, "30 rows have 30 different numbers as labels, which looks like a regression" in err) == (2, True)
    code, _, err = run(capsys, "prepare", "rows.csv", "--base", "base", "--problem", "regression", "--out", "data/rows")
    assert code == 0, err


def test_a_label_too_few_to_learn_is_warned_of_and_conflicts_are_left_out_by_the_next_command(
    here: Path, capsys: Capture
) -> None:
    rows = [f"{n} geht nicht;St\N{LATIN SMALL LETTER O WITH DIAERESIS}rung" for n in range(40)]
    rows += [*(f"{n} Euro;Preis" for n in range(40)), "alles steht;Stoerung", "3 geht nicht;Preis", "oh;Lob", "ah;Lob"]
    Path("rows.csv").write_bytes("\r\n".join(["Nachricht;Kategorie", *rows]).encode("cp1252"))
    code, _, err = run(capsys, "prepare", "rows.csv", "--base", "base", "--seed", "3")
    command = "lora-kit prepare rows.csv --rename Nachricht=text Kategorie=label --base base --seed 3"
    assert (code, f"({command})" in err) == (2, True)
    code, out, _ = run(capsys, *command.split()[1:])
    assert code == 0
    umlaut = "St\N{LATIN SMALL LETTER O WITH DIAERESIS}rung"
    told = " ".join(out.split())
    assert f"label 'Stoerung' has 1 row, too few to learn: --relabel 'Stoerung={umlaut}', or --drop rare" in told
    assert "label 'Lob' has 2 rows, too few to learn: --drop rare" in told
    assert "2 rows of 1 input have different labels (kept)" in told
    command = next(line for line in out.splitlines() if line.startswith("  lora-kit prepare"))
    assert all(flag in command for flag in ("--base base", "--relabel auto", "--drop conflicts rare"))
    code, out, _ = run(capsys, *command.split()[1:])
    assert (code, "2 rows of 1 input have different labels (left out)" in " ".join(out.split())) == (0, True)
    assert f"relabeled: 'Stoerung' is '{umlaut}'" in out
    labels = {row["label"] for row in read_jsonl(here / "data" / "rows" / "train.jsonl")}
    assert labels == {umlaut, "Preis"}


def test_a_key_of_messages_that_nobody_reads_is_named_and_taken_out(here: Path, capsys: Capture) -> None:
    turns = [{"role": "user", "content": "ask", "ts": 1}, {"role": "assistant", "content": "say", "ts": 2}]
    rows = [
        {"messages": [{**turn, "content": f"{turn['content']} {n}"} for turn in turns], "day": n} for n in range(30)
    ]
    texts.write(here / "rows.jsonl", rows)
    code, _, err = run(capsys, "prepare", "rows.jsonl", "--base", "base")
    assert (code, "prepare --rename ts= takes it out" in err, err.count("'ts'")) == (2, True, 1)
    code, out, err = run(capsys, "prepare", "rows.jsonl", "--base", "base", "--rename", "ts=", "day=", "--out", "data")
    assert (code, "not used" in out) == (0, False), err
    written = read_jsonl(here / "data" / "train.jsonl")
    assert {key for row in written for turn in row["messages"] for key in turn} == {"role", "content"}
    code, _, err = run(capsys, "prepare", "rows.jsonl", "--base", "base", "--rename", "time=")
    assert (code, "has no time to take out" in err) == (2, True)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_leaks_are_left_out_by_the_next_command(here: Path, capsys: Capture) -> None:
    texts.write(here / "rows.jsonl", [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(8)])
    texts.write(here / "aside.jsonl", [{"prompt": "ask 3", "completion": "say 3"}])
    code, out, _ = run(capsys, "prepare", "rows.jsonl", "--validation", "aside.jsonl", "--base", "base")
    assert (code, "line 4, see 1" in out) == (0, True)
    command = next(line for line in out.splitlines() if line.startswith("  lora-kit prepare"))
    code, out, _ = run(capsys, *shlex.split(command)[1:])
    assert (code, "7 rows to train on, 1 to validate on" in out) == (0, True)


def test_a_byte_order_mark_is_no_part_of_a_name_whatever_the_encoding(here: Path, capsys: Capture) -> None:
    given = "\ufefftext,label\r\ncaf\xe9,a\r\nb,b\r\nc,a\r\n".encode()
    Path("mixed.csv").write_bytes(given.replace("\xe9".encode(), "\xe9".encode("cp1252")))
    code, _, err = run(capsys, "prepare", "mixed.csv")
    assert (code, "mixed.csv:2: not UTF-8" in err, "--encoding cp1252" in err) == (2, True, True)
    code, out, _ = run(capsys, "prepare", "mixed.csv", "--encoding", "cp1252")
    assert (code, "3 rows: text and label" in out) == (0, True)


def list_commands(printed: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith("  lora-kit ")]


@pytest.mark.parametrize("name", ["-rows", "--out", "it's über $HOME;"])
def test_commands_run_as_they_are_printed_whatever_the_names(here: Path, capsys: Capture, name: str) -> None:
    rows = [{"prompt": f"number {number}", "completion": "word"} for number in (*range(30), 1)]
    texts.write(here / f"{name}.jsonl", rows)
    _, out, _ = run(capsys, "prepare", f"./{name}.jsonl", "--base", "base")
    (command,) = list_commands(out)
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert (here / "data" / name / "recipe.yaml").is_file()
    code, out, err = run(capsys, "prepare", f"./{name}.jsonl", "--base", "base", f"--out={name}")
    assert code == 0, err
    preview, train = list_commands(out)
    code, out, err = run(capsys, *preview)
    assert (code, list_commands(out)) == (0, [train]), err
    assert Path(train[1]).is_file()
