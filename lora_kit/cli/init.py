"""`init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.cli.app import app
from lora_kit.cli.next_steps import build_command, list_training_commands, print_next
from lora_kit.cli.output import print_table
from lora_kit.errors import ConfigError
from lora_kit.names import KIT_BASE

if TYPE_CHECKING:
    from lora_kit.data.preparation.prepared_folder import Preparation

_EXAMPLE: Final = "example"


@app.command
def init(*, task: str | None = None, base: str | None = None, data: str | None = None, out: Path | None = None) -> None:
    """Begin a project: a data folder, a recipe that trains as it is, and the commands in their order.

    On a terminal it asks for what is not given. Nothing that is there is replaced.

    Example: lora-kit init --task classify

    Args:
        task: classify, answer, chat or tag.
        base: Hub id, local folder or kit-base.
        data: File of rows, or a data set of the hub; example for rows to look at and try with.
        out: Folder to write; data/<task> if it is not given.
    """
    if task is None and data is None and not sys.stdin.isatty():
        what = "init asks its questions on a terminal, and this is none"
        raise ConfigError(what, hint="--task classify, answer, chat or tag; and --base, --data, --out")
    if sys.stdin.isatty():
        task, base, data = _ask_rest(task, base, data)
    from lora_kit.data.preparation.start_project import start_project

    folder = out or Path("data", task or Path(str(data)).stem)
    source = None if data in (None, _EXAMPLE) else data
    preparation = start_project(task, folder, base=base or KIT_BASE, data=source)
    _print_commands(preparation)


def _ask_rest(task: str | None, base: str | None, data: str | None) -> tuple[str | None, str, str]:
    """Return the answers to the three questions, of which only those that are open are asked."""
    from rich.prompt import Prompt

    from lora_kit.data.preparation.example_rows import GOALS

    if task is None and data is None:
        print_table(("", ""), [(name, goal.summary) for name, goal in GOALS.items()])
        task = Prompt.ask("What should it learn?", choices=list(GOALS), default=next(iter(GOALS)))
    if base is None:
        base = Prompt.ask(f"Which base: hub id, folder, or {KIT_BASE} (built in, for a try)?", default=KIT_BASE)
    if data is None:
        data = Prompt.ask(f"Where are the rows: a file, or {_EXAMPLE} to be shown some?", default=_EXAMPLE)
    return task, base, data


def _print_commands(preparation: Preparation) -> None:
    from lora_kit.data.mixture import has_text_pairs
    from lora_kit.training.recipe.load import load_recipe

    assert preparation.recipe is not None
    rows = [
        ("rows", str(preparation.parts[0].path)),
        ("written", f"{preparation.out}: {len(preparation.train):,} rows to train on"
                    f", {len(preparation.validation or ()):,} to validate on"),
        ("recipe", str(preparation.recipe)),
    ]  # fmt: skip
    print_table(("", ""), rows)
    recipe = load_recipe(preparation.recipe)
    commands = [build_command(verb, preparation.recipe) for verb in ("preview", "train")]
    print_next([*commands, *list_training_commands(recipe, of_pairs=has_text_pairs(preparation.train))])
