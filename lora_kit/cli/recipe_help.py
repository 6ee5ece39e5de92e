"""The keys of a recipe with a line each, for `train --help`: from the docstrings of the classes that hold them.

The sources are parsed, not imported: torch and transformers would take seconds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_kit.cli.help_format import FilledHelp, lay_out_entries, print_lines, readable_width

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

Entry = tuple[str, str]
"""A flag and what it does."""

_ARGUMENT: Final = re.compile(r"^ {4}(\w+) ?\((.*)\):?$")
"""`    seed (`int`, *optional*, defaults to 42):`, as transformers writes it."""
_HEADING: Final = re.compile(r"^ {4}> (\w.*)$")
_CITATION: Final = re.compile(r" \([^()]*arXiv[^()]*\)")
_DEFAULT: Final = re.compile(r"defaults to [`\"']*([^`\"', )]+)")
_PACKAGE: Final = Path(__file__).parents[1]
_SECTIONS: Final = ("data", "lora", "peft", "train")
_KEYS: Final = {"start_from": "from"}


class RecipeHelp(FilledHelp):
    """The help of a verb whose flags are the keys of a recipe."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        super().__call__(console, options, panel)
        if not panel.entries:
            return
        for title, entries in list_recipe_keys():
            print_lines(console, [f"{title}:", *lay_out_entries(entries, readable_width()), ""])


def list_recipe_keys() -> list[tuple[str, list[Entry]]]:
    """Return the keys that a recipe takes, as flags in titled groups, each with a line that says what it is."""
    recipe = dict(_read_attributes("training/recipe/recipe.py", "Recipe"))
    plain = [(f"--{_KEYS.get(name, name)}", text) for name, text in recipe.items() if name not in _SECTIONS]
    return [
        ("The recipe", plain),
        ("Data", _prefix("data", _read_attributes("training/recipe/recipe.py", "DataSpec"))),
        ("LoRA", _prefix("lora", _read_attributes("config/lora_config.py", "LoraConfig", without=("extra",)))),
        ("PEFT, for method peft", [("--peft.KEY", recipe["peft"])]),
        ("Training", _prefix("train", _read_attributes("training/recipe/train_keys.py", "OwnTrainKeys"))),
        *((f"Training: {heading}", _prefix("train", entries)) for heading, entries in _list_training_arguments()),
    ]


def _prefix(section: str, entries: Sequence[Entry]) -> list[Entry]:
    return [(f"--{section}.{name}", text) for name, text in entries]


def _read_attributes(file: str, name: str, *, without: Sequence[str] = ()) -> list[Entry]:
    """Return the attributes that the docstring of one of our classes lists, and the first sentence about each."""
    doc = _read_docstring(_PACKAGE / file, name)
    section = re.search(r"^Attributes:\n((?: {4}.*\n|\n)+)", f"{doc}\n", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*\n(?: {8,}.*\n)*)", section[1] if section else "", re.MULTILINE)
    return [(key, _take_sentence(text)) for key, text in entries if key not in without]


def _read_docstring(path: Path, name: str) -> str:
    """Return the docstring of a class in a source file that is not imported; empty where there is none."""
    source = path.read_text(encoding="utf-8")
    # Up to its docstring's end: parsing all of a long module takes most of the time that `--help` may take.
    found = re.search(rf'^class {name}\b.*?\n    r?"""(.*?)"""', source, re.MULTILINE | re.DOTALL)
    return ast.get_docstring(ast.parse(f'"""{found[1]}"""')) or "" if found else ""


def _take_sentence(text: str) -> str:
    """Return the first sentence, or all up to a reference to other pages, as plain text."""
    text = _CITATION.sub("", " ".join(text.split()))
    words = re.split(r"(?<=[^.]{2})\.(?= |$)|[;:,]? see `", text)[0]
    words = re.sub(r"\[`?([^]`]+)`?\](\([^)]*\))?", r"\1", words).replace("`", "").replace("*", "")
    return words.rstrip(".:;") + "." if words else ""


def _list_training_arguments() -> Iterator[tuple[str, list[Entry]]]:
    """Yield the fields of transformers.TrainingArguments that a recipe may set, in the groups of its docstring."""
    from lora_kit.training.recipe.train_keys import OWN_FIELDS, UNSUPPORTED_KEYS

    package = find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return
    path = Path(package.submodule_search_locations[0]) / "training_args.py"
    doc = _read_docstring(path, "TrainingArguments")
    lines, heading, entries = doc.splitlines(), "", list[Entry]()
    for number, line in enumerate(lines):
        if title := _HEADING.match(line):
            if entries:
                yield heading, entries
            heading, entries = title[1], []
        elif found := _ARGUMENT.match(line):
            name = found[1]
            if name in UNSUPPORTED_KEYS or name in OWN_FIELDS or name.startswith("hub_"):
                continue
            text = _take_sentence("\n".join(_take_paragraph(lines[number + 1 :])))
            entries.append((name, f"{text}{_format_default(name, found[2])}"))
    if entries:
        yield heading, entries


def _format_default(name: str, described: str) -> str:
    """Return what to say of the default of an argument: ours, or the one that transformers describes."""
    from lora_kit.training.recipe.train_keys import DEFAULTS, LEARNING_RATES, SAVE_STRATEGIES

    by_method = {"learning_rate": LEARNING_RATES, "save_strategy": SAVE_STRATEGIES}.get(name)
    if by_method is not None:
        return f" [default: {', '.join(f'{method} {value}' for method, value in by_method.items())}]"
    found = _DEFAULT.search(described)
    default = DEFAULTS.get(name, found[1] if found else "None")
    return "" if str(default) in ("None", "False") else f" [default: {default}]"


def _take_paragraph(lines: Sequence[str]) -> Iterator[str]:
    """Yield the lines about one argument: those that are indented further than its name."""
    for line in lines:
        if not line.startswith(" " * 8):
            return
        yield line
