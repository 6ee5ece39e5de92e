"""Regular expressions of others over module names: rejected where compiling or matching them would take long."""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Generic, TypeVar

import regex

from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value

MAX_PATTERN_LENGTH: Final = 10_000
MAX_COMPILE_COST: Final = 2**13
MAX_EXPRESSIONS: Final = 1_000
"""Entries of a table of patterns that may be more than plain names."""
MATCH_SECONDS: Final = 0.5
"""Time that one expression may take on one module name, or in all its slow matches, before it is rejected."""
SLOW_SECONDS: Final = 1e-3
"""A match that takes longer is slow: a thousand times what a usual one takes."""
_PLAIN_NAME: Final = re.compile(r"[\w.-]+")
_COUNTS: Final = re.compile(r"\{(\d*),?(\d*)\}")

_Number = TypeVar("_Number", int, float)


def matches(pattern: str, text: str) -> bool:
    """Return whether a regular expression matches the whole text, in bounded time.

    Raises:
        ConfigError: the pattern is malformed, or takes longer than `MATCH_SECONDS` on one text or in all slow matches.
    """
    return compile_expression(pattern).matches(text)


class Expression:
    """A compiled regular expression that is rejected once it has cost too much.

    Raises:
        ConfigError: on construction, for a pattern that is malformed or would take long to compile.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ConfigError(
                f"a pattern of {len(pattern):,} characters was given; at most {MAX_PATTERN_LENGTH:,} are read"
            )
        self._pattern = pattern
        self._seconds_spent = 0.0
        if _estimate_compile_cost(pattern) > MAX_COMPILE_COST:
            raise ConfigError(
                f"the pattern {format_value(pattern)} is nested too deeply, or repeats too often", hint="simplify it"
            )
        try:
            # PEFT reads patterns with `re`. `regex` reads more (recursion, fuzzy matching), which is rejected.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)
            self._compiled = regex.compile(pattern)
        except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
            raise ConfigError(f"{format_value(pattern)} is not a regular expression: {error}") from None

    def matches(self, text: str) -> bool:
        """Return whether the expression matches the whole text; see the function `matches`."""
        began = time.thread_time()
        try:
            match = self._compiled.fullmatch(text, timeout=MATCH_SECONDS)
        except (TimeoutError, MemoryError):
            raise self._too_slow_error(text) from None
        spent = time.thread_time() - began
        if spent > SLOW_SECONDS:
            # One slow match may pass; one for every module of a model may not.
            self._seconds_spent += spent
            if self._seconds_spent > MATCH_SECONDS:
                raise self._too_slow_error(text)
        return match is not None

    def _too_slow_error(self, text: str) -> ConfigError:
        return ConfigError(
            f"the pattern {format_value(self._pattern)} takes too long to match {format_value(text)}",
            hint="nested repetitions backtrack; simplify it",
        )


def _estimate_compile_cost(pattern: str) -> int:
    """Bound the cost of compiling: `regex` doubles its work with every level and unrolls counted repetitions."""
    level = deepest = 0
    for character in pattern:
        level += {"(": 1, ")": -1}.get(character, 0)
        deepest = max(deepest, level)
    cost = 1 << min(deepest, 64)
    for counts in _COUNTS.findall(pattern):
        cost *= max(int(count[:9] or 1) for count in counts) or 1
        cost = min(cost, 2**64)
    return cost


compile_expression = functools.lru_cache(maxsize=4 * MAX_EXPRESSIONS)(Expression)


def is_plain_name(pattern: str) -> bool:
    """Return whether a pattern is a plain name, so that what it matches can be looked up."""
    return _PLAIN_NAME.fullmatch(pattern) is not None


class PatternTable(Generic[_Number]):
    """A `rank_pattern` or `alpha_pattern`: plain names are looked up, expressions are tried in their order.

    Args:
        patterns: from names or expressions over the ends of paths to values.
    """

    def __init__(self, patterns: Mapping[str, _Number]) -> None:
        self._names: dict[str, tuple[int, _Number]] = {}
        self._expressions: list[tuple[int, str, _Number]] = []
        for position, (key, value) in enumerate(patterns.items()):
            if is_plain_name(key):
                self._names[key] = (position, value)
            else:
                self._expressions.append((position, rf"(.*\.)?({key})", value))

    def first(self, path: str, *, default: _Number) -> _Number:
        """Return the value of the first entry that matches the end of a path, from a dot or from its beginning."""
        named = [self._names[name] for name in suffixes_of(path) if name in self._names] if self._names else []
        first, value = min(named, default=(math.inf, default))
        for position, pattern, other in self._expressions:
            if position > first:
                break
            if matches(pattern, path):
                return other
        return value


def suffixes_of(path: str) -> Iterator[str]:
    """Yield the names that match a module: its path, and what is left of its path after each dot."""
    yield path
    while "." in path:
        path = path.partition(".")[2]
        yield path


class NamedEnds:
    """Which of some names match a module: its path, or what is left of its path after a dot.

    Args:
        names: such as `q_proj` and `layers.0.mlp.up_proj`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        # One look-up for each length instead of one for each dot of a path: most names are short, and most paths long.
        self._lengths = sorted({len(name) for name in self._names})

    def find(self, path: str) -> list[str]:
        """Return the names that match, the shortest first."""
        found, size = list[str](), len(path)
        for length in self._lengths:
            if length > size:
                break
            start = size - length
            if (not start or path[start - 1] == ".") and path[start:] in self._names:
                found.append(path[start:])
        return found


def make_ending_matcher(names: Iterable[str]) -> Callable[[str], bool]:
    """Return a test of paths: whether one ends in a name, with or without a dot before it, as in `modules_to_save`."""
    wanted = frozenset(names)
    lengths = {len(name) for name in wanted}  # one look-up for each: names of others may be very many
    return lambda path: any(path[-length:] in wanted for length in lengths)
