"""Checks of a config's values, which may be names, patterns and numbers of others: rejected before they cost anything.

Each function takes the name of the field, for its message. Those that parse return the value as a config keeps it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, TypeGuard, TypeVar

from lora_kit.config.module_patterns import MAX_EXPRESSIONS, compile_expression, is_plain_name
from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value

MAX_RANK: Final = 65_536
"""Above any useful rank; a config asking for more is rejected before anything is allocated."""
_MIN_ALPHA: Final = 1e-30
MAX_ALPHA: Final = 1e30
"""So that the scaling is finite in fp32."""
MAX_NAMES: Final = 65_536
"""Entries that a list of names or a table of patterns may have."""
MAX_TOKENS: Final = 65_536
"""Entries that a list of tokens may have."""

_Number = TypeVar("_Number", int, float)


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError for the value of a field unless a condition holds."""
    if not condition:
        raise _invalid_value_error(name, value, expected)


def check_range(name: str, value: float, low: float, high: float, *, excludes_low: bool = False) -> None:
    """Raise ConfigError unless a number is from `low` to `high`; NaN never is."""
    is_above = value > low if excludes_low else value >= low
    start = f"above {low:g}" if excludes_low else f"from {low:g}"
    require(is_above and value <= high, name, value, f"{start} to {high:g}")


def _invalid_value_error(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"{name} must be {expected}; {format_value(value)} was given")


def is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite int or float; a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_whole_number(value: object) -> TypeGuard[int]:
    """Return whether a value is an int; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def parse_rank(name: str, value: object) -> int:
    """Return a rank: a whole number from 1 to `MAX_RANK`."""
    if not is_whole_number(value) or not 1 <= value <= MAX_RANK:
        raise _invalid_value_error(name, value, f"a whole number from 1 to {MAX_RANK:,}")
    return value


def parse_alpha(name: str, value: object) -> float:
    """Return the numerator of a scaling: a finite number other than 0, in float32 too."""
    if not is_finite_number(value) or not _MIN_ALPHA <= abs(value) <= MAX_ALPHA:
        raise _invalid_value_error(name, value, f"a number other than 0 of a size from {_MIN_ALPHA:g} to {MAX_ALPHA:g}")
    return value


def parse_names(name: str, value: object) -> tuple[str, ...] | None:
    """Return names of modules, of which one or several are given."""
    if value is None or isinstance(value, str):
        return None if value is None else (value,)
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise _invalid_value_error(name, value, "a name, or a list of names")
    require(all(isinstance(item, str) and item for item in value), name, value, "a list of names")
    require(len(value) <= MAX_NAMES, name, value, f"a list of at most {MAX_NAMES:,} names")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def parse_names_or_expression(name: str, value: object, words: Sequence[str]) -> str | tuple[str, ...] | None:
    """Return a list of names, or one regular expression over whole paths.

    Args:
        words: strings that have a meaning of their own, and are returned as they are.
    """
    if not isinstance(value, str):
        return parse_names(name, value)
    if value not in words:
        compile_expression(value)
    return value


def parse_layer_indices(name: str, value: object) -> tuple[int, ...] | None:
    """Return indices of layers, of which one or several are given; None for an empty list."""
    if value is None:
        return None
    items = (value,) if isinstance(value, int) else value
    if not isinstance(items, (list, tuple)) or not all(is_whole_number(item) and item >= 0 for item in items):
        raise _invalid_value_error(name, value, "a list of layer numbers from 0")
    return tuple(items) or None


def parse_pattern_table(name: str, value: object, parse: Callable[[str, object], _Number]) -> Mapping[str, _Number]:
    """Return a table from names, or expressions over the ends of paths, to numbers.

    Args:
        parse: checks one number and returns it.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _invalid_value_error(name, value, "a mapping from module names to numbers")
    expressions = [key for key in value if not is_plain_name(key)]
    few = len(value) <= MAX_NAMES and len(expressions) <= MAX_EXPRESSIONS
    require(few, name, value, f"a mapping of at most {MAX_NAMES:,} names and {MAX_EXPRESSIONS:,} expressions")
    table = {key: parse(f"{name}[{format_value(key)}]", item) for key, item in value.items()}
    for key in expressions:
        compile_expression(rf"(.*\.)?({key})")
    return MappingProxyType(table)


def parse_token_indices(name: str, value: object) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
    """Return indices of tokens: a list of them, or one list for each name of an embedding; None for no tokens."""
    if not isinstance(value, Mapping):
        return None if value is None else _parse_token_list(name, value) or None
    require(all(isinstance(key, str) and key for key in value), name, value, "a mapping from module names to tokens")
    require(len(value) <= MAX_NAMES, name, value, f"a mapping of at most {MAX_NAMES:,} names")
    lists = {key: _parse_token_list(f"{name}[{format_value(key)}]", item) for key, item in value.items()}
    return MappingProxyType({key: tokens for key, tokens in lists.items() if tokens}) or None


def _parse_token_list(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_TOKENS:
        raise _invalid_value_error(name, value, f"a list of at most {MAX_TOKENS:,} tokens")
    invalid = [item for item in value if not is_whole_number(item) or not 0 <= item < 2**63]
    if invalid:
        raise ConfigError(f"{name} names the token {format_value(invalid[0])}; whole numbers from 0 are expected")
    if len(set(value)) < len(value):
        repeated, _ = Counter(value).most_common(1)[0]
        raise ConfigError(f"{name} names the token {repeated} more than once", hint="a row is trained once")
    return tuple(value)
