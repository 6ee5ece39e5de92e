"""As somebody new: from a spreadsheet's export to an adapter, its score and its answers, by commands alone."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from lora_kit.cli.main import main

Capture = pytest.CaptureFixture[str]

GOOD = ("Great service", "Loved the room", "Friendly staff", "Best café in town", "Wonderful view")
BAD = ("Terrible smell", "Dirty room", "Rude staff", "Worst hôtel ever", "Cold food")
SHORT = ["--train.max_steps", "3", "--train.per_device_train_batch_size", "2", "--train.save_strategy", "no"]
QUICK = ["--train.learning_rate", "2e-3", "--train.per_device_train_batch_size", "8", "--train.save_strategy", "no"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def export(file: str, rows: Sequence[Sequence[str]]) -> bytes:
    """A CSV as spreadsheets write it: a byte order mark, lines that end in two characters, quotes where needed."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows(rows)
    Path(file).write_bytes(out.getvalue().encode("utf-8-sig"))
    return Path(file).read_bytes()


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    return code, *capsys.readouterr()


def command_in(out: str, verb: str) -> list[str]:
    """The next command that the last one has printed."""
    line = next(line for line in out.splitlines() if line.startswith(f"  lora-kit {verb}"))
    return shlex.split(line)[1:]


@pytest.mark.slow
def test_reviews_become_a_classifier(here: Path, capsys: Capture) -> None:
    rows = [[" Review Text ", "Sentiment", "Date", ""]]
    rows += [[f"{text}, visit {n}", mood, "2024", ""] for n in range(6) for text, mood in
             [*((text, "positive") for text in GOOD), *((text, "negative") for text in BAD)]]  # fmt: skip
    rows += [
        ['He said "never again"\nand left', "negative", "", ""],
        ["", "positive", "", ""],
        ["No label", "", "", ""],
        ["Great service, visit 0", "positive", "", ""],
        ["A lovely stay", "postive", "", ""],
        ["", "", "", ""],
    ]
    given = export("reviews.csv", rows)
    code, _, err = run(capsys, "prepare", "reviews.csv")
    assert code == 2
    assert "Review Text, Sentiment" in err
    assert "--rename" in err
    names = ["--rename", "Review Text=text", "Sentiment=label"]
    code, out, _ = run(capsys, "prepare", "reviews.csv", *names)
    assert code == 0
    for told in ("line 64: text is empty", "line 65: label is empty", "line 66, see 2", "postive"):
        assert told in out, out
    code, _, err = run(capsys, "prepare", "reviews.csv", *names, "--out", "reviews")
    assert code == 2
    assert "--drop empty" in err
    assert not Path("reviews").exists()

    code, out, _ = run(capsys, "prepare", "reviews.csv", *names, "--drop", "empty", "duplicates", "--share", "0.2",
                       "--out", "reviews")  # fmt: skip
    assert code == 0
    texts = {json.loads(line)["text"] for line in Path("reviews/train.jsonl").read_text("utf-8").splitlines()}
    assert any("hôtel" in text for text in texts)
    assert run(capsys, *command_in(out, "preview"))[0] == 0
    code, out, _ = run(capsys, *command_in(out, "train"), *QUICK, "--train.num_train_epochs", "5")
    assert code == 0
    assert "adapters/reviews" in out

    flags = ["--data", "reviews/validation.jsonl", "--adapter", "reviews"]
    code, out, _ = run(capsys, "eval", *flags, "--json", "--compare", "--out", "said.jsonl")
    assert code == 0
    base, adapter = json.loads(out)["results"]
    assert adapter["metrics"]["accuracy"] >= 0.8
    assert adapter["metrics"]["loss"] < base["metrics"]["loss"]
    said = [json.loads(line) for line in Path("said.jsonl").read_text("utf-8").splitlines()]
    assert {each["expected"] for each in said} == {"positive", "negative"}
    assert Path("reviews.csv").read_bytes() == given


def test_a_byte_order_mark_is_no_part_of_a_name_whatever_the_encoding(here: Path, capsys: Capture) -> None:
    given = export("mixed.csv", [["text", "label"], ["caf\xe9", "a"], ["b", "b"], ["c", "a"]])
    Path("mixed.csv").write_bytes(given.replace("\xe9".encode(), "\xe9".encode("cp1252")))
    code, _, err = run(capsys, "prepare", "mixed.csv")
    assert (code, "mixed.csv:2: not UTF-8" in err, "--encoding cp1252" in err) == (2, True, True)
    code, out, _ = run(capsys, "prepare", "mixed.csv", "--encoding", "cp1252")
    assert (code, "3 rows: text and label" in out) == (0, True)


@pytest.mark.slow
def test_questions_become_answers(here: Path, capsys: Capture) -> None:
    rows = [[" Question ", "ANSWER", "id"]]
    rows += [[f'Where is room {n}?\nHe said "hurry"', f"Room {n} is on the {floor} floor.", str(n)]
             for n in range(30) for floor in ("first" if n < 15 else "second",)]  # fmt: skip
    rows += [["", "nothing", "30"], [rows[3][0], rows[3][1], "31"]]
    export("faq.csv", rows)
    names = ["--rename", "Question=prompt", "ANSWER=completion"]
    code, out, _ = run(capsys, "prepare", "faq.csv", *names, "--drop", "empty", "duplicates", "--out", "faq")
    assert code == 0
    assert "line 62: prompt is empty" in out
    code, out, _ = run(capsys, *command_in(out, "train"), *QUICK, "--train.num_train_epochs", "8")
    assert code == 0

    code, out, _ = run(capsys, "eval", "--data", "faq/validation.jsonl", "--adapter", "faq", "--compare", "--json")
    assert code == 0
    base, adapter = json.loads(out)["results"]
    assert adapter["metrics"]["perplexity"] < base["metrics"]["perplexity"] / 100

    question = 'Where is room 7?\nHe said "hurry"'
    code, out, err = run(capsys, "generate", "--adapter", "faq", "--prompt", question, "--max-new-tokens", "24")
    assert (code, err) == (0, "")
    assert "floor" in out


TOOLS = [{"type": "function", "function": {"name": "find_room", "parameters": {"type": "object", "properties": {
    "größe": {"type": "integer"}}}}}]  # fmt: skip
TEMPLATE = """{%- if short %}<short>{% endif %}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}
{%- for m in messages %}<|{{ m.role }}|>
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}
{{- eos_token if m.role == "assistant" else "<|end|>" }}{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


def talk(number: int) -> dict[str, object]:
    """A conversation as tools export it: parts, null values, calls with arguments as text, a thought."""
    call = {"function": {"name": "find_room", "arguments": json.dumps({"größe": number})}}
    return {
        "messages": [
            {"role": "system", "content": "Sei höflich – und „kurz“.", "tool_calls": None},
            {"role": "user", "content": [{"type": "text", "text": f"Ist Zimmer {number} frei? \"Ja\" oder 'Nein'"}]},
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": None},
            {"role": "tool", "content": "frei", "name": "find_room"},
            {"role": "assistant", "content": f"Ja, Zimmer {number} ist frei – schön!", "train": True},
        ],
        "tools": TOOLS,
        "id": number if number % 2 else f"#{number}",
    }


def test_messy_conversations_become_an_adapter_that_answers(here: Path, capsys: Capture) -> None:
    lines = [json.dumps(talk(number), ensure_ascii=False) for number in range(12)]
    lines += ['{"messages": [{"role": "user", "content": 5}]}', "not json", ""]
    Path("talks.jsonl").write_bytes("\r\n".join(lines).encode("cp1252"))
    Path("house.jinja").write_text(TEMPLATE, "utf-8")
    flags = [
        "--drop",
        "bad",
        "--share",
        "0.2",
        "--learn",
        "last",
        "--chat-template-kwargs",
        "short=true",
        "--out",
        "talks",
    ]
    code, out, _ = run(capsys, "prepare", "talks.jsonl", "--chat-template", "house.jinja", *flags)
    assert (code, "cp1252" in out, "line 13: message 1" in out, "line 14: not JSON" in out) == (0, True, True, True)
    code, shown, _ = run(capsys, *command_in(out, "preview"))
    assert code == 0
    learned = [line for line in shown.splitlines() if line.startswith("+")]
    assert len(learned) == 1
    assert "schön!" in learned[0]
    assert "<short><tools>" in shown  # the template was given `short`
    code, out, _ = run(capsys, *command_in(out, "train"), *SHORT)
    assert code == 0
    code, scores, _ = run(capsys, *command_in(out, "eval"), "--json")
    base, adapter = json.loads(scores)["results"]
    assert (code, adapter["metrics"]["loss"] < base["metrics"]["loss"]) == (0, True)
    code, out, _ = run(capsys, *command_in(out, "generate"), "--max-new-tokens", "4")
    assert (code, bool(out.strip())) == (0, True)
