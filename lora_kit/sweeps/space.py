"""What a sweep is over: recipe keys, each with a list of values or a range of numbers.

    lora.r=4,8,16    train.learning_rate=1e-4..1e-2:log    train.warmup_steps=0..100

A range whose ends are written as whole numbers is of whole numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.training.recipe.coerce import parse_yaml
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import DataSpec, Recipe
from lora_kit.training.recipe.training_arguments import OWN_FIELDS, get_training_argument_types

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = bool | int | float | str | None
Params = Mapping[str, Value]

_NUMBER: Final = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE: Final = re.compile(rf"\s*({_NUMBER})\.\.({_NUMBER})(:log)?\s*")
_FIXED: Final = {
    "out": "every trial has a folder of its own",
    "task": "trials are compared by one metric",
    "data.validation": "trials are compared on the same rows",
}
_MOST: Final = 10_000
"""Combinations of a grid at the most."""


@dataclass(frozen=True)
class Choices:
    """A few values."""

    values: tuple[Value, ...]

    def to_json(self) -> Any:
        return list(self.values)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.values)

    @property
    def samples(self) -> tuple[Value, ...]:
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, whole ones where both ends are; evenly spread, or so are their logarithms."""

    low: int | float
    high: int | float
    log: bool

    def to_json(self) -> Any:
        return f"{self.low!r}..{self.high!r}" + (":log" if self.log else "")

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    @property
    def samples(self) -> tuple[Value, ...]:
        """What a recipe must take for it to take all of the range."""
        return (self.low, self.high)


Space = Mapping[str, Choices | Range]


def space_of(over: Mapping[str, Any] | Iterable[str]) -> Space:
    """The space that was asked for.

    Args:
        over: by recipe key a list of values or a text (`4,8,16`, `1e-4..1e-2:log`); or texts with their key and `=`.

    Raises:
        RecipeError: it cannot be read; a key is there twice, or not one of a recipe (the nearest is named).
    """
    space: dict[str, Choices | Range] = {}
    for key, given in over.items() if isinstance(over, Mapping) else map(_pair, over):
        _check_key(key)
        if key in space:
            raise RecipeError(f"{key} is swept twice", hint="give all its values at once: KEY=VALUE,VALUE")
        space[key] = _read(key, given)
    if not space:
        raise RecipeError("a sweep is over one recipe key at least", hint="for example lora.r=4,8,16")
    return space


def _pair(text: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not equals:
        raise RecipeError(f"{text!r} is not KEY=VALUES", hint="for example lora.r=4,8,16")
    return key.strip().removeprefix("--"), values


def _read(key: str, given: Any) -> Choices | Range:
    if isinstance(given, str):
        match = _RANGE.fullmatch(given)
        if match:
            return _range(key, *match.groups())
        given = parse_yaml(key, f"[{given}]")
    if not isinstance(given, Sequence) or not given:
        raise RecipeError(f"{key}: a list of values or a range LOW..HIGH was expected; {given!r} was given")
    values = tuple(_plain(key, value) for value in given)
    if len(set(map(repr, values))) < len(values):
        raise RecipeError(f"{key} has a value twice: {format_list([str(value) for value in values])}")
    return Choices(values)


def _plain(key: str, value: Any) -> Value:
    """A value as a study can keep it: lists and mappings as text, which a recipe reads again."""
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{key} must be finite; {value} was given")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return json.dumps(list(value) if isinstance(value, tuple) else value)
    except TypeError:
        raise RecipeError(f"{key}: {value!r} is not a value that a recipe can hold") from None


def _range(key: str, first: str, last: str, log: str | None) -> Range:
    whole = all(end.lstrip("+-").isdecimal() for end in (first, last))
    low, high = (int(first), int(last)) if whole else (float(first), float(last))
    if not low < high:
        raise RecipeError(f"{key}: a range goes from low to high; {first}..{last} was given")
    if log and low <= 0:
        raise RecipeError(f"{key}: a range with :log begins above 0; {first} was given")
    return Range(low, high, bool(log))


def _check_key(key: str) -> None:
    if key in _FIXED:
        raise RecipeError(f"{key} cannot be swept", hint=_FIXED[key])
    keys = recipe_keys()
    if key in keys or key.startswith("peft."):  # whose fields depend on the type: the recipe tells
        return
    last = key.rpartition(".")[2]
    # People leave the section out, or name another one.
    meant = [known for known in keys if known.rpartition(".")[2] == last]
    close = f"did you mean {meant[0]!r}?" if meant else suggest_nearest(key, keys)
    raise RecipeError(f"a recipe has no key {key!r}", hint=close or "docs/recipes.md lists them")


def recipe_keys() -> list[str]:
    """Every key of a recipe, sections with a dot."""
    sections: dict[str, Iterable[str]] = {
        "data": [field.name for field in dataclasses.fields(DataSpec)],
        "lora": [field.name for field in dataclasses.fields(LoraConfig) if field.name != "extra"],
        "peft": (),
        "train": [*get_training_argument_types(), *OWN_FIELDS],
    }
    own = [field.name for field in dataclasses.fields(Recipe) if field.name not in sections]
    return own + [f"{section}.{name}" for section, names in sections.items() for name in names]


def check_values(space: Space, fields: Mapping[str, Any]) -> None:
    """Whether a recipe takes every value, each by itself.

    Raises:
        RecipeError: it does not.
    """
    for key, values in space.items():
        for value in values.samples:
            load_recipe(fields, overrides={key: value})


def grid(space: Space) -> Iterator[dict[str, Value]]:
    """Every combination of a finite space, the last key changing fastest."""
    values = [choices.samples for choices in space.values()]
    return (dict(zip(space, combination, strict=True)) for combination in itertools.product(*values))


def size_of(space: Space) -> int | None:
    """Combinations of a space; None where a range makes them endless.

    Raises:
        RecipeError: there are too many to go through.
    """
    if any(isinstance(values, Range) for values in space.values()):
        return None
    count = math.prod(len(choices.samples) for choices in space.values())
    if count > _MOST:
        raise RecipeError(f"the space has {count:,} combinations; {_MOST:,} at the most", hint="fewer values")
    return count
