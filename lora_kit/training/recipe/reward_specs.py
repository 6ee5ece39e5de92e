"""The reward functions of a recipe: `rewards.py:has_answer`, or a list of these and of `{function, weight}`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lora_kit.errors import RecipeError
from lora_kit.io.text import format_value
from lora_kit.training.recipe.coerce import check_known_keys, coerce_value
from lora_kit.training.recipe.objectives import GRPO, generates_answers
from lora_kit.training.recipe.strict_yaml import parse_yaml

_FORM: Final = "FILE.py:FUNCTION"
_HINT: Final = "for example rewards.py:has_answer"


@dataclass(frozen=True)
class RewardSpec:
    """A function that says how good an answer is.

    Attributes:
        file: of Python; a relative path starts from the working directory.
        function: its name in the file.
        weight: of what it returns in the reward, which is the sum over all functions.
    """

    file: str
    function: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The file and the function, as a recipe has them."""
        return f"{self.file}:{self.function}"


RewardSpecs = tuple[RewardSpec, ...]


def parse_rewards(value: object) -> RewardSpecs:
    """Return the reward functions that a recipe names; a flag may give a list as YAML.

    Raises:
        RecipeError: the value is neither `FILE.py:FUNCTION` nor a list of these and of `{function, weight}`.
    """
    if isinstance(value, str) and value.startswith("["):
        value = parse_yaml("rewards", value)
    if isinstance(value, (str, Mapping, RewardSpec)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"rewards must be {_FORM} or a list; {format_value(value)} was given", hint=_HINT)
    specs = tuple(_parse_reward(f"rewards[{index}]", item) for index, item in enumerate(value))
    names = [spec.function for spec in specs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        what = f"rewards has two functions of the name {twice}, by which the log tells them apart"
        raise RecipeError(what, hint="give one of them another name")
    return specs


def _parse_reward(name: str, item: object) -> RewardSpec:
    if isinstance(item, RewardSpec):
        return item
    if isinstance(item, str):
        item = {"function": item}
    if not isinstance(item, Mapping) or "function" not in item:
        what = f"{name} must be {_FORM} or a mapping with function and perhaps weight; {format_value(item)} was given"
        raise RecipeError(what, hint=_HINT)
    check_known_keys(item, ("function", "weight"), where=f"{name}.")
    given = coerce_value(f"{name}.function", str, item["function"])
    file, _, function = given.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise RecipeError(f"{name} must be {_FORM}; {format_value(given)} was given", hint=_HINT)
    weight = coerce_value(f"{name}.weight", float, item.get("weight", 1.0))
    if not math.isfinite(weight) or weight == 0:
        raise RecipeError(f"{name}.weight must be a number other than 0; {weight:g} was given")
    return RewardSpec(file, function, weight)


def check_rewards(objective: str, rewards: Sequence[RewardSpec]) -> None:
    """Raise RecipeError where an objective needs reward functions and has none, or the reverse."""
    generates = generates_answers(objective)
    if generates and not rewards:
        raise RecipeError(f"objective {objective} needs rewards: functions of a Python file", hint=_HINT)
    if rewards and not generates:
        raise RecipeError(f"rewards are for objective {GRPO}; the objective is {objective}", hint="take them out")


def describe_rewards(rewards: Sequence[RewardSpec]) -> object:
    """Return what a recipe's file says of reward functions, from which `parse_rewards` builds them again."""
    items = [spec.name if spec.weight == 1 else {"function": spec.name, "weight": spec.weight} for spec in rewards]
    return items[0] if len(items) == 1 and isinstance(items[0], str) else items


def rename_reward_files(rewards: RewardSpecs, rename: Callable[[str], str]) -> RewardSpecs:
    """Return the functions with other paths of their files."""
    return tuple(dataclasses.replace(spec, file=rename(spec.file)) for spec in rewards)
