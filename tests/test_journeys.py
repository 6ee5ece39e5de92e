"""Five people on their first day: each types a first command, and then what the commands before it have printed.

No command is edited. Each ends with 0, but for the first look at a file whose columns have other names. The recipe that
`prepare` wrote is cut to three steps (`hurry`), so that a training takes a second.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest
import torch

import lora_kit as lk
from lora_kit.cli.main import main
from tests.support.examples import EXAMPLES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

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
    assert "theirs" in journey.type("lora-kit list")
    journey.type("lora-kit eval questions.csv --base kit-base --adapter theirs --compare")
    assert "theirs" in journey.said
    journey.type("lora-kit merge --base kit-base --adapter theirs --out merged/theirs")
    journey.type("lora-kit export theirs --target vllm --out out/theirs")
    assert Path("out/theirs/adapter_model.safetensors").is_file()


def test_an_engineer_who_ships(journey: Journey) -> None:
    journey.type("lora-kit demo --adapters adapters")
    assert "pirate" in journey.follow("list")
    journey.follow("generate")
    assert "fits" in journey.type("lora-kit check pirate --target vllm")
    journey.type("lora-kit export pirate --target vllm --out out/pirate")
    journey.type("lora-kit merge --adapter pirate --out merged/pirate")
    sent = journey.type("lora-kit push pirate --repo someone/pirate --base someone/kit-base --dry-run")
    assert "adapter_model.safetensors" in sent


def test_somebody_who_knows_the_old_course(journey: Journey) -> None:
    bring("questions.csv")
    journey.type("lora-kit prepare questions.csv")
    journey.follow("prepare")
    hurry("data/questions/recipe.yaml")
    journey.follow("train")
    journey.follow("eval")
    journey.follow("generate")
