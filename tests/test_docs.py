"""The documents: the code, the commands and the recipes that they show run."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lora_kit as lk
from lora_kit.bank.peft_bridge.adopt import AdoptedBank
from lora_kit.cli.app import app
from lora_kit.cli.main import main
from lora_kit.cli.recipe_flags import parse_recipe_flags
from lora_kit.cli.train import split_recipes
from lora_kit.training.recipe.load import load_recipe
from tests.support import pages
from tests.support.long_runs import take_few
from tests.support.pages import GUIDES, PAGES, Block, blocks, name_of

TRAINERS = "docs/trainers.md"
"""Its code is run by test_trl.py, which knows how to put TRL away again."""
SHORT_GUIDES = {"first-hour", "classify", "memory", "tagging"}
"""Of those that are followed from top to bottom; the long run follows all."""
MINUTES = {"demo", "doctor", "sweep"}
"""Verbs that are not run here: their lines are read. Each has tests of its own."""
PARSED_ONLY = {"sign", "verify"}
"""They need keys that other programs make; test_signing.py runs them."""
DEFAULTS = {
    "base": "kit-base",
    "data": {"train": "train.jsonl", "validation": "valid.jsonl"},
    "out": "adapters/made",
}
"""What a piece of a recipe is completed with."""
MADE_THERE = {"README.md": ("adapters/mine",), "docs/tour.md": ("adapters/sql", "adapters/mine")}
"""What a page makes itself, so that it is not there before."""
SWITCHES = ("dry_run", "json", "replace", "together")
"""Flags of `train` that are no recipe keys."""

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def with_blocks(*languages: str) -> pytest.MarkDecorator:
    found = [page for page in PAGES if blocks(page, *languages) and page not in GUIDES]
    return pytest.mark.parametrize("page", found, ids=name_of)


def each_block(*languages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page, *languages)], ids=str)


def names_for(page: Path) -> dict[str, Any]:
    """What the code of a page takes for granted, beside the files of `world`."""
    names: dict[str, Any] = {"lk": lk}
    if name_of(page) == "README.md":
        names |= {"torch": torch, "model": lk.load_base("kit-base").model}
    return names


def recipes(page: Path) -> list[dict[str, Any]]:
    """The whole recipes of a page."""
    found = [yaml.safe_load(block.code) for block in blocks(page, "yaml")]
    return [recipe for recipe in found if {"base", "out"} <= set(recipe)]


def set_out(page: Path) -> None:
    """What a page makes is not there yet; its own recipe is `recipe.yaml`."""
    for folder in MADE_THERE.get(name_of(page), ()):
        shutil.rmtree(folder)
    Path("recipe.yaml").write_text(yaml.safe_dump((recipes(page) or [DEFAULTS])[0]), "utf-8")
    for block in blocks(page, "yaml"):
        if block.file:
            Path(block.file).write_text(block.code, "utf-8")


# What is shown runs


@with_blocks("python")
def test_the_python_of_a_page_runs(page: Path, here: Path) -> None:
    if name_of(page) == TRAINERS:
        pytest.skip("run by test_trl.py")
    set_out(page)
    names = names_for(page)
    for block in blocks(page, "python"):
        code = compile(block.code, str(block), "exec")
        if block.runs:
            exec(code, names)


@with_blocks("sh")
def test_the_commands_of_a_page_run(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_out(page)
    for block in blocks(page, "sh"):
        run_commands(block, capsys)


@pytest.mark.parametrize("page", take_few(GUIDES, *(page for page in GUIDES if page.stem in SHORT_GUIDES)), ids=name_of)
def test_a_guide_runs_from_top_to_bottom(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its trainings end after two steps: the point is that each command takes what those before it made."""
    set_out(page)
    names = names_for(page)
    for block in blocks(page, "sh", "python", "csv", "jsonl"):
        if block.language == "sh":
            run_commands(block, capsys, "--train.max_steps", "2")
        elif block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
        elif block.file:
            assert Path(block.file).read_text("utf-8").startswith(block.code), f"{block} is not what {block.file} has"


def run_commands(block: Block, capsys: pytest.CaptureFixture[str], *train_flags: str) -> None:
    """Let the application read the commands of a block, and run those that take no minutes.

    Args:
        train_flags: what a training is given besides.
    """
    for _, *tokens in (command for command in pages.commands(block) if command[0] == "lora-kit"):
        parsed(tokens, str(block))
        if block.runs and tokens[0] not in MINUTES | PARSED_ONLY:
            code = main([*tokens, *(train_flags if tokens[0] == "train" else ())])
            assert code == 0, f"{block}: {' '.join(tokens)}\n{capsys.readouterr().err}"


def parsed(tokens: list[str], where: str) -> None:
    """Let the application read a command; recipe keys among its flags go through the reader of recipes."""
    try:
        _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        _, rest = split_recipes(Path(), bound.arguments.get("flags", ()))
        flags = parse_recipe_flags(rest)
        load_recipe(DEFAULTS, overrides={key: value for key, value in flags.items() if key not in SWITCHES})
    except Exception as error:
        raise AssertionError(f"{where}: {' '.join(tokens)}: {error}") from error


@each_block("yaml", "toml")
def test_recipes_that_are_shown_pass_the_strict_reader(block: Block) -> None:
    shown = yaml.safe_load(block.code) if block.language == "yaml" else tomllib.loads(block.code)
    load_recipe({**DEFAULTS, **shown})


@each_block("python")
def test_calls_that_are_shown_fit_what_they_call(block: Block) -> None:
    """Where code is not run, its calls of this library are compared with the functions at least."""
    for call in (node for node in ast.walk(ast.parse(block.code)) if isinstance(node, ast.Call)):
        found = re.fullmatch(r"(lk|bank)\.([\w.]+)", ast.unparse(call.func))
        if not found or any(keyword.arg is None for keyword in call.keywords):
            continue
        function: Any = lk if found[1] == "lk" else AdoptedBank
        for name in found[2].split("."):
            function = getattr(function, name)
        function = getattr(function, "sweep" if found[2] == "sweep" else found[2], function)  # a callable package
        own = [None] if found[1] == "bank" else []
        signature = inspect.signature(function)
        signature.bind(*own, *call.args, **{str(keyword.arg): keyword.value for keyword in call.keywords})
