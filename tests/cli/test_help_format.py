"""`--help` as people read it: every flag with what it does, filled to the width of the terminal."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from lora_kit.cli.app import app, list_verbs
from lora_kit.cli.help_format import EXAMPLE
from lora_kit.cli.main import main
from lora_kit.cli.recipe_help import list_recipe_keys
from lora_kit.cli.verb_groups import OPTIONS, VERB_GROUPS
from lora_kit.config.lora_config import LoraConfig
from lora_kit.models.quantization import QUANTIZATIONS
from lora_kit.models.tasks import PROBLEMS, TASKS
from lora_kit.training.recipe.recipe import METHODS, DataSpec, Recipe
from tools.docs_reference import arguments, names_of, verbs

Capture = pytest.CaptureFixture[str]


def help_of(verb: str, capsys: Capture) -> str:
    assert main([verb, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", verbs())
def test_help_says_what_every_argument_does(verb: str, capsys: Capture) -> None:
    told = " ".join(help_of(verb, capsys).split())
    for argument in arguments(verb):
        assert argument.parameter.help, f"{verb}: nothing is said of {argument.names}"
        assert " ".join(argument.parameter.help.split()) in told
        assert all(name in told for name in names_of(argument))


@pytest.mark.parametrize("verb", verbs())
@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_is_filled_to_the_width_of_the_terminal(
    verb: str, width: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = help_of(verb, capsys).splitlines()
    long = [line for line in lines if len(line) > width and line.strip() != example_of(verb)]
    assert all(len(line.split()) == 1 for line in long), long
    for line, following in pairwise(lines):
        if goes_on(line, following):
            assert len(line) + 1 + len(following.split()[0]) > min(width, 120), f"{line!r} is broken too early"


def goes_on(line: str, following: str) -> bool:
    """Whether a line is the rest of the one before it."""
    if following.startswith("      "):
        is_name_alone = bool(re.fullmatch(r"  \S+( \S+)*", line))
        return not is_name_alone
    return bool(following and line) and not line.startswith(" ") and not line.endswith(":")


def example_of(verb: str) -> str:
    """The line to type that the help of a verb shows."""
    found = re.findall(rf"^ *{EXAMPLE}(.+)$", app[verb].help, re.MULTILINE)
    assert len(found) == 1, f"{verb} has {len(found)} examples"
    return found[0]


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_has_an_example_that_the_parser_takes(verb: str) -> None:
    line = example_of(verb)
    assert len(line) < 76
    program, *words = shlex.split(line)
    assert (program, words[0]) == ("lora-kit", verb)
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_every_verb_is_in_one_group() -> None:
    grouped = [verb for names in VERB_GROUPS.values() for verb in names]
    assert len(grouped) == len(set(grouped))
    assert set(list_verbs()) <= set(grouped)


def test_the_help_of_all_verbs_lists_them_by_what_people_do(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n{title}:\n") for title in (*VERB_GROUPS, OPTIONS)]
    assert places == sorted(places)
    listed = [line.split()[0] for line in out.splitlines() if re.match("  [a-z]", line)]
    assert listed == ["lora-kit", *(verb for names in VERB_GROUPS.values() for verb in names if verb in app)]


def test_the_tab_key_completes_verbs_and_flags(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(app.generate_completion(shell="bash"))
    ask = "source $0; COMP_WORDS=(lora-kit $1 $2); COMP_CWORD=$3; _lora_kit; echo ${COMPREPLY[@]}"

    def complete(*words: str) -> list[str]:
        place = str(len([word for word in words if word]))
        done = subprocess.run(["bash", "-c", ask, script, *words, place], capture_output=True, text=True, check=True)
        return sorted(done.stdout.split())

    assert complete("pre", "") == ["predict", "prepare", "preview"]
    assert complete("list", "--j") == ["--json"]


def test_help_does_not_say_that_a_flag_is_off(capsys: Capture) -> None:
    assert "False" not in help_of("generate", capsys)
    assert "[default: 128]" in help_of("generate", capsys)
    assert "[required]" in help_of("plan", capsys)


# The keys of a recipe


def test_the_help_of_train_has_a_line_for_every_key_of_a_recipe(capsys: Capture) -> None:
    from lora_kit.training.recipe.train_keys import OWN_FIELDS, UNSUPPORTED_KEYS
    from lora_kit.training.recipe.training_arguments import get_training_argument_types

    entries = {flag: text for _, entries in list_recipe_keys() for flag, text in entries}
    assert all(entries.values()), [flag for flag, text in entries.items() if not text]
    shown = {flag.removeprefix("--") for flag in entries}
    recipe = {"start_from": "from", "peft": "peft.KEY"}
    wanted = {recipe.get(field.name, field.name) for field in fields(Recipe)} - {"data", "lora", "train"}
    wanted |= {f"data.{field.name}" for field in fields(DataSpec)}
    wanted |= {f"lora.{field.name}" for field in fields(LoraConfig) if field.name != "extra"}
    settable = {key for key in get_training_argument_types() if not key.startswith("hub_")} - set(UNSUPPORTED_KEYS)
    assert shown == wanted | {f"train.{key}" for key in settable | set(OWN_FIELDS)}
    printed = help_of("train", capsys)
    assert all(f"  {flag}" in printed for flag in entries)
    assert "[default: lora 0.0002, features 0.001" in printed


@pytest.mark.parametrize(
    ("key", "values"), [("task", TASKS), ("problem", PROBLEMS), ("method", METHODS), ("quantize", QUANTIZATIONS)]
)
def test_the_line_of_a_key_names_every_value_that_it_takes(key: str, values: tuple[str, ...]) -> None:
    line = dict(list_recipe_keys()[0][1])[f"--{key}"]
    assert set(values) <= set(re.findall(r"[\w-]+", line))
