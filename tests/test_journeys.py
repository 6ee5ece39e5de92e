"""People on their first day: each types one command, and from there on what the commands before have printed.

No command is edited. Each ends with 0, but for the first look at a file whose columns have other names. In the quick
ones the recipe that `prepare` wrote is cut to three steps (`hurry`), so that a training takes a second; the slow ones
train as it is written, and look whether it was learned.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest
import torch

import lora_kit as lk
from lora_kit.cli.main import main
from tests.support.examples import EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

GOOD = ("Great service", "Loved the room", "Friendly staff", "Best café in town", "Wonderful view")
BAD = ("Terrible smell", "Dirty room", "Rude staff", "Worst hôtel ever", "Cold food")
_LINE = re.compile(r"^  (lora-kit .+)$|\((lora-kit prepare .+)\)$", re.MULTILINE)


@dataclass
class Journey:
    """One person's commands.

    Attributes:
        name: who it is.
        commands: what was run, with its seconds.
        printed: the commands that were printed and not yet run, in order.
    """

    name: str
    capsys: pytest.CaptureFixture[str]
    commands: list[tuple[str, float]] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)
    said: str = ""

    def type(self, command: str, *, code: int = 0) -> str:
        """Run a command of the person's own, and note the commands that it prints."""
        started = time.perf_counter()
        found = main(shlex.split(command)[1:])
        self.commands.append((command, time.perf_counter() - started))
        captured = self.capsys.readouterr()
        self.said = captured.out + captured.err
        assert found == code, f"{command}\n{self.said}"
        self.printed += [shown for match in _LINE.findall(self.said) for shown in match if shown]
        return self.said

    def follow(self, verb: str, *, code: int = 0) -> str:
        """Run the last printed command of a verb as it was printed."""
        shown = [command for command in self.printed if command.startswith(f"lora-kit {verb} ")]
        assert shown, f"no command of {verb} was printed: {self.printed}"
        return self.type(shown[-1], code=code)


@pytest.fixture(scope="module")
def table() -> Iterator[list[Journey]]:
    """The journeys that were made; printed with `-s`: commands, seconds."""
    made: list[Journey] = []
    yield made
    print("\n| journey | commands | edited | failing | seconds |\n|---|---|---|---|---|")
    for each in made:
        print(f"| {each.name} | {len(each.commands)} | 0 | 0 | {sum(seconds for _, seconds in each.commands):.1f} |")


@pytest.fixture
def journey(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    table: list[Journey],
) -> Journey:
    monkeypatch.chdir(tmp_path)
    table.append(Journey(request.node.name.removeprefix("test_"), capsys))
    return table[-1]


def hurry(recipe: str) -> None:
    """Cut a prepared recipe to three steps: what is printed stays, and the test takes seconds."""
    text = Path(recipe).read_text("utf-8")
    Path(recipe).write_text(re.sub(r"num_train_epochs: \S+", "max_steps: 3", text), "utf-8")


def bring(name: str) -> None:
    Path(name).write_bytes((EXAMPLES / "data" / name).read_bytes())


def write_spreadsheet(file: str, rows: Sequence[Sequence[str]]) -> None:
    """Write a CSV as spreadsheets do: a byte order mark, lines that end in two characters, quotes where needed."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows(rows)
    Path(file).write_bytes(out.getvalue().encode("utf-8-sig"))


def read_metric(said: str, name: str) -> tuple[float, float]:
    """Return a metric of the validation rows before and after a training."""
    found = re.search(rf"validation {name} +([\d.]+) before, ([\d.]+) after", said)
    assert found, said
    return float(found[1]), float(found[2])


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


def test_a_support_engineer_with_a_messy_spreadsheet(journey: Journey) -> None:
    bring("tickets.csv")
    journey.type("lora-kit prepare tickets.csv", code=2)
    assert "error: " in journey.said
    journey.follow("prepare")
    assert "220 rows" in journey.said
    journey.follow("prepare")
    assert "196 rows to train on" in journey.said
    journey.follow("preview")
    hurry("data/tickets/recipe.yaml")
    journey.follow("train")
    assert "accuracy" in journey.follow("eval")
    assert re.search("delivery|invoice|login|refund", journey.follow("predict"))


def test_a_developer_with_chat_logs(journey: Journey) -> None:
    bring("chats.jsonl")
    journey.type("lora-kit prepare chats.jsonl")
    journey.follow("prepare")
    assert "Assistant:" in journey.follow("preview")
    hurry("data/chats/recipe.yaml")
    journey.follow("train")
    assert "perplexity" in journey.follow("eval")
    assert journey.follow("generate").strip()


def test_somebody_with_a_folder_of_peft(journey: Journey) -> None:
    base = lk.load_base("kit-base", dtype="fp32")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peft.get_peft_model(base.model, config).save_pretrained("adapters/theirs")
    bring("questions.csv")
    assert "theirs" in journey.type("lora-kit eval questions.csv --adapter theirs --compare")
    assert journey.follow("generate").strip()
    journey.follow("merge")
    assert journey.follow("generate").strip()
    assert "model.safetensors" in journey.follow("push")
    assert Path("merged/theirs/model.safetensors").is_file()


def test_an_engineer_who_ships(journey: Journey) -> None:
    journey.type("lora-kit demo --adapters adapters")
    assert "pirate" in journey.follow("list")
    journey.follow("inspect")
    assert journey.follow("generate").strip()
    assert "fits" in journey.follow("check")
    assert "vllm serve" in journey.follow("export")
    journey.follow("merge")
    assert "model.safetensors" in journey.follow("push")


def test_somebody_who_knows_the_old_course(journey: Journey) -> None:
    bring("questions.csv")
    journey.type("lora-kit prepare questions.csv")
    journey.follow("prepare")
    hurry("data/questions/recipe.yaml")
    journey.follow("train")
    journey.follow("eval")
    journey.follow("generate")


def test_somebody_with_messy_conversations(journey: Journey) -> None:
    lines = [json.dumps(talk(number), ensure_ascii=False) for number in range(12)]
    lines += ['{"messages": [{"role": "user", "content": 5}]}', "not json", ""]
    Path("talks.jsonl").write_bytes("\r\n".join(lines).encode("cp1252"))
    Path("house.jinja").write_text(TEMPLATE, "utf-8")
    flags = "--chat-template house.jinja --chat-template-kwargs short=true --learn last --share 0.2"
    said = journey.type(f"lora-kit prepare talks.jsonl {flags}")
    assert all(told in said for told in ("cp1252", "line 13: message 1", "line 14: not JSON"))
    journey.follow("prepare")
    shown = journey.follow("preview")
    learned = [line for line in shown.splitlines() if line.startswith("+")]
    assert len(learned) == 1
    assert "schön!" in learned[0]
    assert "<short><tools>" in shown  # the template was given `short`
    hurry("data/talks/recipe.yaml")
    before, after = read_metric(journey.follow("train"), "loss")
    assert after < before
    journey.follow("eval")
    assert journey.follow("generate").strip()


@pytest.mark.slow
def test_reviews_become_a_classifier_that_has_learned_them(journey: Journey) -> None:
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
    write_spreadsheet("reviews.csv", rows)
    given = Path("reviews.csv").read_bytes()
    said = journey.type("lora-kit prepare reviews.csv", code=2)
    assert "Review Text, Sentiment" in said
    said = journey.follow("prepare")
    for told in ("line 64: text is empty", "line 65: label is empty", "line 66, see 2", "postive"):
        assert told in said, said
    assert "label 'postive'" not in journey.follow("prepare")
    train = Path("data/reviews/train.jsonl").read_text("utf-8").splitlines()
    assert any("hôtel" in json.loads(line)["text"] for line in train)
    assert {json.loads(line)["label"] for line in train} == {"positive", "negative"}
    journey.follow("preview")
    before, after = read_metric(journey.follow("train"), "accuracy")
    assert after >= max(0.8, before)
    journey.follow("eval")
    assert re.search("positive|negative", journey.follow("predict"))
    assert Path("reviews.csv").read_bytes() == given


@pytest.mark.slow
def test_questions_become_answers_that_are_known(journey: Journey) -> None:
    rows = [[" Question ", "ANSWER", "id"]]
    rows += [[f'Where is room {n}?\nHe said "hurry"', f"Room {n} is on the {floor} floor.", str(n)]
             for n in range(30) for floor in ("first" if n < 15 else "second",)]  # fmt: skip
    rows += [["", "nothing", "30"], [rows[3][0], rows[3][1], "31"]]
    write_spreadsheet("faq.csv", rows)
    journey.type("lora-kit prepare faq.csv", code=2)
    assert "line 62: prompt is empty" in journey.follow("prepare")
    journey.follow("prepare")
    before, after = read_metric(journey.follow("train"), "perplexity")
    assert after < before / 100
    journey.follow("eval")
    question = shlex.quote('Where is room 7?\nHe said "hurry"')
    assert "floor" in journey.type(f"lora-kit generate --adapter faq --prompt {question} --max-new-tokens 24")
