"""Every command that a verb prints runs as it is printed, on a base that is a folder."""

from __future__ import annotations

import html
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_kit.cli.main import main
from tests.support import texts, tiny

Capture = pytest.CaptureFixture[str]

ROWS: dict[str, list[dict[str, Any]]] = {
    "completion": [{"prompt": f"ask {n}", "completion": f"say {n};"} for n in range(40)],
    "label": [{"text": f"where is card {n}", "label": "card"} for n in range(20)]
    + [{"text": f"send {n} pounds", "label": "money"} for n in range(20)],
    "pair": [
        {"text": f"card {n}", "text_pair": f"the card {n // 2 * 2}", "label": "odd" if n % 2 else "even"}
        for n in range(40)
    ],
    "chat": [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]}
        for n in range(40)
    ],
    "text": [{"text": f"text number {n} of some length"} for n in range(40)],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose name needs quotes, with a base in a folder."""
    work = tmp_path / "a folder's name"
    tiny.llama().save_pretrained(work / "my base")
    texts.tokenizer().save_pretrained(work / "my base")
    monkeypatch.chdir(work)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # of `chat`, which ends at once
    return work


def run(capsys: Capture, *arguments: str) -> str:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    assert code == 0, f"lora-kit {shlex.join(arguments)}: {err}"
    return out


def commands_in(printed: str) -> Iterator[list[str]]:
    """The arguments of every command on a line of its own."""
    for line in re.findall(r"^\s*lora-kit [a-z].*$", printed, re.MULTILINE):
        yield shlex.split(line)[1:]


def follow_all(capsys: Capture, *first: str) -> list[str]:
    """Run a command, those that it prints, and those that they print; return their verbs in the order of printing."""
    waiting, seen = [list(first)], set[tuple[str, ...]]()
    verbs = list[str]()
    while waiting:
        command = waiting.pop(0)
        if tuple(command) in seen:
            continue
        seen.add(tuple(command))
        verbs.append(command[0])
        waiting += commands_in(run(capsys, *command))
        if command[0] == "prepare":
            hurry(Path(command[command.index("--out") + 1], "recipe.yaml"))
    return verbs


def hurry(recipe: Path) -> None:
    """Train two steps, so large that a merge in 16 bits does not lose them."""
    fields = yaml.safe_load(recipe.read_text("utf-8"))
    fields["train"] = {"max_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    recipe.write_text(yaml.safe_dump(fields), "utf-8")


def run_commands_of_page(page: Path, capsys: Capture) -> None:
    commands = list(commands_in(html.unescape(re.sub(r"<[^>]+>", "\n", page.read_text("utf-8")))))
    assert commands, "the page shows how the result is used"
    for command in commands:
        run(capsys, *command)


@pytest.mark.parametrize("layout", ROWS)
def test_from_rows_to_the_hub_every_command_runs_as_printed(here: Path, capsys: Capture, layout: str) -> None:
    texts.write(here / "my rows.jsonl", ROWS[layout])
    verbs = follow_all(capsys, "prepare", "my rows.jsonl", "--base", "my base", "--out", "my data")
    ask = "predict" if layout in ("label", "pair") else "generate"
    chat = ["chat"] * (layout == "chat")
    assert verbs == ["prepare", "preview", "train", "eval", ask, *chat, "merge", ask, *chat, "push"]
    texts.write(here / "rows.jsonl", ROWS[layout][:2])
    run_commands_of_page(next(here.glob("adapters/*/report.html")), capsys)


def test_an_adapter_of_pairs_takes_no_single_text_and_the_other_way_round(here: Path, capsys: Capture) -> None:
    for name in ("pair", "label"):
        texts.write(here / f"{name}.jsonl", ROWS[name])
        run(capsys, "prepare", f"{name}.jsonl", "--base", "my base", "--out", name)
        hurry(Path(name, "recipe.yaml"))
        run(capsys, "train", f"{name}/recipe.yaml")
    for adapter, rows, flags, message in (
        ("pair", "label", [], "adapter 'pair' was trained on pairs of texts, and one text was given"),
        (
            "label",
            "pair",
            ["--text-pair", "b"],
            "adapter 'label' was trained on single texts, and two texts were given",
        ),
    ):
        for command in (["predict", "-a", adapter, "a", *flags], ["eval", f"{rows}.jsonl", "-a", adapter]):
            assert main(command) == 2, command
            assert message in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["pair", "chat", "completion"])
def test_a_merged_model_is_asked_as_its_adapter_was(here: Path, capsys: Capture, layout: str) -> None:
    """A base has no record of its own, so what it was trained on goes with what is merged into it."""
    texts.write(here / "rows.jsonl", ROWS[layout])
    run(capsys, "prepare", "rows.jsonl", "--base", "my base", "--out", "data", "--test", "0.2")
    hurry(Path("data/recipe.yaml"))
    after_training = list(commands_in(run(capsys, "train", "data/recipe.yaml")))
    assert after_training[0][:2] == ["eval", "data/test.jsonl"]
    assert [verb for verb, *_ in after_training].count("chat") == (layout == "chat")
    merging = ["merge", "--adapter", "data", "--out", "merged", "--dtype", "float32"]
    used = [command for command in commands_in(run(capsys, *merging)) if command[0] != "push"]
    for command in used:
        run(capsys, *command)
    assert [verb for verb, *_ in used].count("chat") == (layout == "chat")
    verb = "predict" if layout == "pair" else "generate"
    asked = ["ask 3", "--text-pair", "say 3"] if layout == "pair" else ["--prompt", "ask 3", "--max-new-tokens", "9"]
    printed = [run(capsys, verb, *who, *asked, "--json") for who in (["-a", "data"], ["--base", "merged"])]
    adapter, merged = map(json.loads, printed)
    if layout == "pair":
        assert main(["predict", "--base", "merged", "a text alone"]) == 2
        assert "merged was trained on pairs of texts, and one text was given" in capsys.readouterr().err
        assert merged["probabilities"] == pytest.approx(adapter["probabilities"], abs=1e-4)
    else:
        assert merged[0]["prompt"] == adapter[0]["prompt"]


@pytest.mark.slow  # a sweep, and five adapters of which each is merged
def test_what_is_made_of_a_trained_adapter_needs_no_base_named(here: Path, capsys: Capture) -> None:
    texts.write(here / "rows.jsonl", ROWS["completion"])
    run(capsys, "prepare", "rows.jsonl", "--base", "my base", "--out", "data")
    hurry(Path("data/recipe.yaml"))
    over = ["--over", "lora.r=2,4", "--out", "adapters/swept", "--train.max_steps", "1"]
    assert follow_all(capsys, "sweep", "data/recipe.yaml", *over) == [
        "sweep",
        "eval",
        "generate",
        "merge",
        "generate",
        "push",
    ]
    [dry] = commands_in(run(capsys, "train", "data/recipe.yaml", "--lora.r", "4", "--dry-run"))
    assert dry == ["train", "data/recipe.yaml", "--lora.r", "4"]
    run(capsys, *dry)
    listed = ["list", "inspect", "generate", "merge", "check", "generate", "push", "export"]
    assert follow_all(capsys, "list") == listed
    run(capsys, "export", "data", "--target", "peft", "--out", "for peft")
    made = ["generate", "merge", "check", "generate", "push", "export"]
    for arguments in (
        ["export", "data", "--target", "merged", "--out", "exported/whole"],
        ["convert", "for peft", "--out", "converted"],
        ["combine", "-a", "data", "-a", "swept", "--weight", "1", "--weight", "2", "--out", "combined"],
        ["resize", "data", "--rank", "2", "--out", "resized"],
        ["extract", "--base", "my base", "--tuned", "merged/data", "--rank", "2", "--out", "extracted"],
    ):
        verb, *rest = follow_all(capsys, *arguments)
        assert rest == (["generate", "push"] if verb == "export" else made)


def test_a_command_that_would_not_run_is_not_printed(here: Path, capsys: Capture) -> None:
    """An adapter whose base is elsewhere is not asked; one that a server cannot take is not checked for it."""
    texts.write(here / "rows.jsonl", ROWS["label"])
    run(capsys, "prepare", "rows.jsonl", "--base", "my base", "--out", "data")
    hurry(Path("data/recipe.yaml"))
    run(capsys, "train", "data/recipe.yaml")
    assert [verb for verb, *_ in commands_in(run(capsys, "inspect", "data"))] == ["predict", "merge"]
    Path("my base").rename("elsewhere")
    assert list(commands_in(run(capsys, "inspect", "data"))) == []


@pytest.mark.parametrize("method", ["features", "full"])
def test_other_methods(here: Path, capsys: Capture, method: str) -> None:
    texts.write(here / "rows.jsonl", ROWS["label"])
    recipe = {
        "base": "my base",
        "out": "my adapter",
        "task": "classify",
        "method": method,
        "data": {"train": "rows.jsonl", "validation": "rows.jsonl"},
        "train": {"max_steps": 2},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    for command in commands_in(run(capsys, "train", "recipe.yaml")):
        run(capsys, *command)
    run_commands_of_page(Path("my adapter", "report.html"), capsys)
