"""Reward functions from the Python files that a recipe names: loaded, called as TRL calls them, and checked each time.

A function is given lists with one item for each answer, by keyword: `prompts`, `completions` and `completion_ids`, and
every further column of the rows; also `trainer_state`, `log_extra` and `log_metric`. It returns a number for each
answer, or None where it does not apply.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import numbers
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from torch import Tensor

from lora_kit.data.prompt_samples import PromptDataset
from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.io.text import escape_text, format_value, shorten
from lora_kit.training.recipe.reward_specs import RewardSpec

_GIVEN: Final = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that TRL calls every reward function with."""
_FORM: Final = "def has_answer(completions, answer, **kwargs): return [1.0 if … else 0.0 for …]"


class RewardFunction:
    """A function of the user's; what it returns is checked before anything is learned from it.

    Args:
        spec: as the recipe names it.
        call: the function.
        sha256: of its file, in hex.
    """

    def __init__(self, spec: RewardSpec, call: Callable[..., object], *, sha256: str) -> None:
        self.spec, self._call, self.sha256 = spec, call, sha256
        self.__name__ = spec.function

    def check_arguments(self, columns: Iterable[str]) -> None:
        """Raise RecipeError unless the function can be called with what TRL gives it and with these columns."""
        names = [*_GIVEN, *columns]
        try:
            inspect.signature(self._call).bind(**dict.fromkeys(names))
        except (TypeError, ValueError) as error:
            given = format_list(names, most=20)
            what = f"{escape_text(self.spec.name)} cannot be called with {given}: {error}"
            raise RecipeError(what, hint=f"**kwargs takes the rest: {_FORM}") from None

    def __call__(self, **given: object) -> list[float | None]:
        """Return the reward of each answer; None where the function does not apply.

        Raises:
            RecipeError: the function fails, or returns anything but a finite number or None for each answer.
        """
        name = escape_text(self.spec.name)
        try:
            result = self._call(**given)
        except Exception as error:
            raise RecipeError(f"{name} failed: {_describe(error, self.spec.file)}") from error
        answers = given["completions"]
        assert isinstance(answers, Sequence)
        if isinstance(result, (str, bytes)) or not isinstance(result, Iterable):
            what = f"{name} returned {format_value(result)}; a list of {len(answers)} numbers was expected"
            raise RecipeError(what, hint=_FORM)
        rewards = list(result)
        if len(rewards) != len(answers):
            raise RecipeError(f"{name} returned {len(rewards)} rewards for {len(answers)} answers", hint=_FORM)
        return [_read_reward(name, reward, answer) for reward, answer in zip(rewards, answers, strict=True)]


def _read_reward(name: str, reward: object, answer: object) -> float | None:
    value = reward.item() if isinstance(reward, Tensor) and reward.ndim == 0 else reward
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        what = f"{name} returned {format_value(value)} for the answer {shorten(format_value(answer), most=80)}"
        raise RecipeError(what, hint="a finite number, or None where the function does not apply")
    return float(value)


def load_rewards(specs: Sequence[RewardSpec]) -> tuple[RewardFunction, ...]:
    """Return the functions that a recipe names. Each file is run once, as `import` would run it.

    Raises:
        RecipeError: a file is missing or fails, or has no such function.
    """
    sources = {file: _read_file(Path(file)) for file in dict.fromkeys(spec.file for spec in specs)}
    modules = {file: _run_file(Path(file), source) for file, source in sources.items()}
    return tuple(
        RewardFunction(
            spec, _find_function(spec, modules[spec.file]), sha256=hashlib.sha256(sources[spec.file]).hexdigest()
        )
        for spec in specs
    )


def check_reward_columns(rewards: Sequence[RewardFunction], samples: Iterable[object]) -> None:
    """Raise RecipeError where a function cannot be called with the columns of prompts; other samples have none."""
    for prompts in samples:
        if isinstance(prompts, PromptDataset):
            for reward in rewards:
                reward.check_arguments(column for column in prompts.columns if column != "prompt")


def _run_file(path: Path, source: bytes) -> types.ModuleType:
    """Return the module of a file. It is not imported by name: that would leave compiled files beside it."""
    module = types.ModuleType(f"lora_kit_rewards_{hashlib.sha256(source).hexdigest()[:12]}")
    module.__file__ = str(path.absolute())
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"{escape_text(path)} cannot be run: {_describe(error, path)}") from error
    return module


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"rewards: {escape_text(path)} cannot be read: {error.strerror or error}"
        hint = f"a relative path starts from the working directory, {escape_text(Path.cwd())}"
        raise RecipeError(what, hint=hint) from None


def _find_function(spec: RewardSpec, module: types.ModuleType) -> Callable[..., object]:
    found = getattr(module, spec.function, None)
    if found is None:
        own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = suggest_nearest(spec.function, own) or (f"it has {format_list(own)}" if own else "it has no function")
        raise RecipeError(f"{escape_text(spec.file)} has no function {spec.function}", hint=hint)
    if not callable(found):
        raise RecipeError(f"{escape_text(spec.name)} is {type(found).__name__}, not a function", hint=_FORM)
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
        raise RecipeError(f"{escape_text(spec.name)} is async", hint="a plain function may call asyncio.run")
    return found


def _describe(error: BaseException, file: str | Path) -> str:
    """Return an error of the user's code with the line of their file where it occurred."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    own = str(Path(file).absolute())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    return shorten(f"{text} (line {lines[-1]})" if lines and lines[-1] else text, most=400)
