"""What a sweep tries: recipe keys, each with a list of values or a range of numbers.

    lora.r=4,8,16    train.learning_rate=1e-4..1e-2:log    train.warmup_steps=0..100

A range whose ends are both written as whole numbers holds whole numbers only.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.training.recipe.coerce import coerce_value, parse_yaml
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.objectives import TRL_OBJECTIVES, get_objective_types
from lora_kit.training.recipe.recipe import DataSpec, Recipe
from lora_kit.training.recipe.train_keys import OWN_FIELDS
from lora_kit.training.recipe.training_arguments import get_training_argument_types

if TYPE_CHECKING:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    Distribution = CategoricalDistribution | IntDistribution | FloatDistribution
    Space = Mapping[str, Distribution]
    """What each swept recipe key is drawn from."""

Value = bool | int | float | str | None
Params = Mapping[str, Value]

_NUMBER: Final = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE: Final = re.compile(rf"\s*({_NUMBER})\.\.({_NUMBER})(:log)?\s*")
_FIXED: Final = {
    "out": "every trial has a folder of its own",
    "task": "trials are compared by one metric",
    "objective": "trials are compared by one metric",
    "rewards": "trials are compared by them",
    "data.validation": "trials are compared on the same rows",
}
_MAX_COMBINATIONS: Final = 10_000


def parse_space(over: Mapping[str, object] | Iterable[str]) -> Space:
    """Read the space that a sweep covers.

    Args:
        over: for each recipe key a list of values or a text (`4,8,16`, `1e-4..1e-2:log`); or texts `KEY=VALUES`.

    Raises:
        RecipeError: a text is invalid; a key is given twice, or is no key of a recipe (the nearest is named).
    """
    given: object = over
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise RecipeError(
            f"keys with their values were expected; {over!r} was given", hint="for example {'lora.r': [4, 8]}"
        )
    space: dict[str, Distribution] = {}
    for key, values in over.items() if isinstance(over, Mapping) else map(_split_pair, over):
        _check_key(key)
        if key in space:
            raise RecipeError(f"{key} is swept twice", hint="give all its values at once: KEY=VALUE,VALUE")
        match = _RANGE.fullmatch(values) if isinstance(values, str) else None
        space[key] = _parse_range(key, *match.groups()) if match else _parse_choices(key, values)
    if not space:
        raise RecipeError("a sweep needs at least one recipe key", hint="for example lora.r=4,8,16")
    return space


def _split_pair(text: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not equals:
        raise RecipeError(f"{text!r} is not KEY=VALUES", hint="for example lora.r=4,8,16")
    return key.strip().removeprefix("--"), values


def _parse_range(key: str, first: str, last: str, log: str | None) -> IntDistribution | FloatDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high = (coerce_value(key, float, end) for end in (first, last))
    whole = isinstance(low, int) and isinstance(high, int)
    try:
        return (IntDistribution if whole else FloatDistribution)(low, high, log=bool(log))
    except ValueError as error:
        raise RecipeError(f"{key}={first}..{last}{log or ''} is invalid: {error}") from None


def _parse_choices(key: str, values: object) -> CategoricalDistribution:
    from optuna.distributions import CategoricalDistribution

    if isinstance(values, str):
        values = parse_yaml(key, f"[{values}]")
    if not isinstance(values, Sequence) or not values:
        raise RecipeError(f"{key}: {values!r} was given; a list of values or a range LOW..HIGH was expected")
    choices = [_encode_choice(key, value) for value in values]
    if len(set(choices)) < len(choices):
        raise RecipeError(f"{key} has a value twice: {format_list(list(map(str, choices)))}")
    return CategoricalDistribution(choices)


def _encode_choice(key: str, value: object) -> Value:
    """Return a value as Optuna stores it: lists and mappings as JSON text, which a recipe reads again."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else coerce_value(key, float, value)
    try:
        return json.dumps(value)
    except TypeError:
        raise RecipeError(f"{key}: a recipe cannot hold the value {value!r}") from None


def _check_key(key: str) -> None:
    if key in _FIXED:
        raise RecipeError(f"{key} cannot be swept", hint=_FIXED[key])
    keys = recipe_keys()
    # The fields of `peft` depend on its type, those of TRL on the objective: `check_values` sees which recipe it is.
    if key in keys or key.startswith("peft.") or is_objective_key(key):
        return
    last = key.rpartition(".")[2]
    # People leave the section out, or name another one.
    same_name = [known for known in keys if known.rpartition(".")[2] == last]
    close = f"did you mean {same_name[0]!r}?" if same_name else suggest_nearest(key, keys)
    raise RecipeError(f"a recipe has no key {key!r}", hint=close or "docs/recipes.md lists them")


def is_objective_key(key: str) -> bool:
    """Return whether an objective of TRL has this key of `train`; False where TRL is not installed."""
    section, _, name = key.partition(".")
    if section != "train":
        return False
    try:
        return any(name in get_objective_types(objective) for objective in TRL_OBJECTIVES)
    except RecipeError:
        return False


def recipe_keys() -> list[str]:
    """Return every key of a recipe, those of a section with a dot (`lora.r`)."""
    sections: dict[str, Iterable[str]] = {
        "data": [field.name for field in dataclasses.fields(DataSpec)],
        "lora": [field.name for field in dataclasses.fields(LoraConfig) if field.name != "extra"],
        "peft": (),
        "train": [*get_training_argument_types(), *OWN_FIELDS],
    }
    own = [field.name for field in dataclasses.fields(Recipe) if field.name not in sections]
    return own + [f"{section}.{name}" for section, names in sections.items() for name in names]


def format_space(space: Space) -> dict[str, list[Value] | str]:
    """Return a space as JSON values, which `parse_space` reads again."""
    return {key: _format_values(distribution) for key, distribution in space.items()}


def _format_values(distribution: Distribution) -> list[Value] | str:
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    return f"{distribution.low!r}..{distribution.high!r}" + (":log" if distribution.log else "")


def check_values(space: Space, fields: Mapping[str, object]) -> None:
    """Check that a recipe accepts every value, each by itself; of a range its two ends.

    Raises:
        RecipeError: it rejects one.
    """
    for _ in _load_each(space, fields):
        pass


def _load_each(space: Space, fields: Mapping[str, object]) -> Iterator[Recipe]:
    """Yield the recipe with every value, each by itself; of a range with its two ends."""
    from optuna.distributions import CategoricalDistribution

    for key, values in space.items():
        for value in values.choices if isinstance(values, CategoricalDistribution) else (values.low, values.high):
            yield load_recipe(fields, overrides={key: value})


def check_trials_together(space: Space, fields: Mapping[str, object]) -> None:
    """Check that trials can be trained over one base at once, with every value by itself.

    Raises:
        RecipeError: names the key or the value that needs a training of its own.
    """
    from lora_kit.training.together.train_many import check_recipes_together

    for key in space:
        if not key.startswith(("lora.", "train.")):
            raise RecipeError(f"{key} cannot be swept with trials trained together: they share base and rows",
                              hint="leave together out, or sweep keys of lora and train")  # fmt: skip
    for recipe in _load_each(space, fields):
        check_recipes_together([recipe])


def list_combinations(space: Space) -> list[dict[str, Value]] | None:
    """Return every combination of the listed values, the last key changing fastest; None where a key has a range.

    Raises:
        RecipeError: there are more than 10,000.
    """
    from optuna.distributions import CategoricalDistribution

    choices = [values.choices for values in space.values() if isinstance(values, CategoricalDistribution)]
    if len(choices) < len(space):
        return None
    count = math.prod(map(len, choices))
    if count > _MAX_COMBINATIONS:
        raise RecipeError(f"the space has {count:,} combinations; at most {_MAX_COMBINATIONS:,} are allowed",
                          hint="give fewer values")  # fmt: skip
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*choices)]
