"""Flags that are keys of a recipe, checked before torch and transformers are imported: those take seconds.

The names are read in the sources of the classes that hold them, which are not imported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from lora_kit.errors import ConfigError, RecipeError, find_nearest, format_list
from lora_kit.io.text import shorten
from lora_kit.training.recipe.train_keys import OWN_FIELDS, UNSUPPORTED_KEYS

_PACKAGE: Final = Path(__file__).parents[1]
_RECIPE: Final = "training/recipe/recipe.py"
_OTHER_OBJECTIVE: Final = re.compile(r"^\W*objective\b", re.MULTILINE)
_FIELD: Final = re.compile(r"^ {4}(\w+): ", re.MULTILINE)
_SECTIONS: Final = ("train", "lora", "data", "peft")
_RENAMED: Final = {"start_from": "from"}
_OLDER_NAMES: Final = ("gradient_checkpointing", "gradient_checkpointing_kwargs")
"""Of fields of transformers.TrainingArguments; not all versions have them."""
_TYPING_ERROR: Final = 0.7
"""Share of the letters that a key and a mistyped one have in common."""
_MOST_SHOWN: Final = 20


def parse_recipe_flags(flags: Sequence[str]) -> dict[str, str]:
    """Return `{"lora.r": "8", "out": "x", "replace": "true"}` for `--lora.r 8 --out=x --replace`.

    Dashes in keys become underscores.

    Raises:
        ConfigError: a value without a key.
    """
    values: dict[str, str] = {}
    tokens = list(flags)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            raise ConfigError(
                f"{token!r} was given where a flag such as --lora.r was expected", hint="lora-kit train --help"
            )
        key, equals, value = token[2:].partition("=")
        if not equals:
            value = tokens.pop(0) if tokens and not tokens[0].startswith("--") else "true"
        values[key.replace("-", "_")] = value
    return values


def check_recipe_keys(keys: Collection[str], recipes: Sequence[Path], *, flag: str = "--") -> None:
    """Check that keys are those of a recipe.

    The keys of other objectives than `sft` are TRL's, and those of `peft` PEFT's; they are checked with the recipe.

    Args:
        recipes: the files that the keys are for.
        flag: what stands before a key on the command line.

    Raises:
        RecipeError: a key is unknown; names the nearest.
    """
    for key in keys:
        section, dot, name = key.partition(".")
        is_known = name in _list_keys(section) if dot and section in _SECTIONS else key in _list_keys("")
        is_of_others = section == "peft" or (section == "train" and _may_have_objective(keys, recipes))
        if is_known or (dot and is_of_others):
            continue
        raise RecipeError(shorten(f"{flag}{key}: a recipe has no such key"), hint=_suggest(key, flag))


def _suggest(key: str, flag: str) -> str:
    section, dot, name = key.partition(".")
    if dot and section in _SECTIONS:
        known = _list_usable(section)
        nearest = find_nearest(name, known)
        nearest = nearest and f"{section}.{nearest}"
    elif dot:
        known, nearest = list(_SECTIONS), find_nearest(section, _SECTIONS)
        nearest = nearest and f"{nearest}.{name}"
    else:
        known, nearest = _list_keys(""), _find_in_sections(key)
    return f"did you mean {flag}{nearest}?" if nearest else f"known: {format_list(known, most=_MOST_SHOWN)}"


def _find_in_sections(key: str) -> str | None:
    """Return the key that was meant: of the recipe itself, or one of a section that was left out (`lr`)."""
    own = _list_keys("")
    if difflib.get_close_matches(key, own, cutoff=_TYPING_ERROR):
        return find_nearest(key, own)
    dotted = {name: f"{section}.{name}" for section in ("data", "lora", "train") for name in _list_usable(section)}
    nearest = find_nearest(key, [*own, *dotted])
    return dotted.get(nearest, nearest) if nearest else None


def _may_have_objective(keys: Collection[str], recipes: Sequence[Path]) -> bool:
    """Return whether an objective is named, or a recipe cannot be read: reading it again reports that."""
    if "objective" in keys:
        return True
    try:
        return any(_OTHER_OBJECTIVE.search(file.read_text("utf-8")) for file in recipes)
    except (OSError, ValueError):
        return True


def _list_usable(section: str) -> list[str]:
    return [name for name in _list_keys(section) if section != "train" or name not in UNSUPPORTED_KEYS]


@cache
def _list_keys(section: str) -> list[str]:
    """Return the keys of a section of a recipe; of the recipe itself for an empty name."""
    if section == "train":
        package = find_spec("transformers")
        folder = Path(next(iter(package.submodule_search_locations or ()))) if package else _PACKAGE
        names = _read_fields(folder / "training_args.py", "TrainingArguments")
        return [*names, *_OLDER_NAMES, *OWN_FIELDS]
    if section == "lora":
        return _read_fields(_PACKAGE / "config/lora_config.py", "LoraConfig")
    names = _read_fields(_PACKAGE / _RECIPE, "DataSpec" if section == "data" else "Recipe") if section != "peft" else []
    return [_RENAMED.get(name, name) for name in names]


def _read_fields(path: Path, name: str) -> list[str]:
    """Return the fields of a dataclass in a source file."""
    source = path.read_text(encoding="utf-8")
    found = re.search(rf"^class {name}\b.*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)
    return _FIELD.findall(found[0]) if found else []
