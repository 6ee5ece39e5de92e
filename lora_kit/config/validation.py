"""Checks of a config's values, in which names, patterns and numbers of others stand: refused before they cost anything.

Each takes the name of its field for the message, and gives the value as a config keeps it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from lora_kit.config.module_patterns import MAX_EXPRESSIONS, compile_expression, is_plain_name
from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value

MAX_RANK: Final = 65_536
"""Above any useful rank; a config asking for more is refused before anything is allocated."""
MAX_ALPHA: Final = 1e30
"""So that the scaling is finite in fp32."""
MAX_NAMES: Final = 65_536
"""Entries a list of names or a table of patterns may have."""
MAX_TOKENS: Final = 65_536
"""Entries a list of tokens may have."""


def require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}; {format_value(value)} was given")


def is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_rank(name: str, value: Any) -> None:
    require(is_whole_number(value) and 1 <= value <= MAX_RANK, name, value, f"a whole number from 1 to {MAX_RANK:,}")


def check_alpha(name: str, value: Any) -> None:
    require(is_finite_number(value) and 0 < abs(value) <= MAX_ALPHA, name, value, "a finite number other than 0")


def parse_names(name: str, value: Any) -> tuple[str, ...] | None:
    """Names of modules: one, or a list of them."""
    if value is None or isinstance(value, str):
        return None if value is None else (value,)
    require(isinstance(value, (list, tuple, set, frozenset)), name, value, "a name, or a list of names")
    require(all(isinstance(item, str) and item for item in value), name, value, "a list of names")
    require(len(value) <= MAX_NAMES, name, value, f"a list of at most {MAX_NAMES:,} names")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def parse_names_or_expression(name: str, value: Any, *, words: Sequence[str] = ()) -> str | tuple[str, ...] | None:
    """A list of names, or one regular expression over whole paths.

    Args:
        words: that have a meaning of their own.
    """
    if not isinstance(value, str):
        return parse_names(name, value)
    if value not in words:
        compile_expression(value)
    return value


def parse_layer_indices(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    items = (value,) if isinstance(value, int) else value
    whole = isinstance(items, (list, tuple)) and all(is_whole_number(item) and item >= 0 for item in items)
    require(whole, name, value, "a list of layer numbers from 0")
    return tuple(items) or None


def parse_pattern_table(name: str, value: Any, check: Callable[[str, Any], None]) -> Mapping[str, Any]:
    """A table from names or expressions over the ends of paths to numbers, each of which is checked."""
    require(isinstance(value, Mapping), name, value, "a mapping from module names to numbers")
    require(all(isinstance(key, str) for key in value), name, value, "a mapping from module names to numbers")
    expressions = [key for key in value if not is_plain_name(key)]
    few = len(value) <= MAX_NAMES and len(expressions) <= MAX_EXPRESSIONS
    require(few, name, value, f"a mapping of at most {MAX_NAMES:,} names and {MAX_EXPRESSIONS:,} expressions")
    for key, item in value.items():
        check(f"{name}[{format_value(key)}]", item)
    for key in expressions:
        compile_expression(rf"(.*\.)?({key})")
    return MappingProxyType(dict(value))


def parse_token_indices(name: str, value: Any) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
    """Numbers of tokens: a list of them, or one for each name of an embedding."""
    if not isinstance(value, Mapping):
        return None if value is None else _parse_token_list(name, value) or None
    require(all(isinstance(key, str) and key for key in value), name, value, "a mapping from module names to tokens")
    require(len(value) <= MAX_NAMES, name, value, f"a mapping of at most {MAX_NAMES:,} names")
    found = {key: _parse_token_list(f"{name}[{format_value(key)}]", item) for key, item in value.items()}
    return MappingProxyType({key: item for key, item in found.items() if item}) or None


def _parse_token_list(name: str, value: Any) -> tuple[int, ...]:
    listed = isinstance(value, (list, tuple))
    require(listed and len(value) <= MAX_TOKENS, name, value, f"a list of at most {MAX_TOKENS:,} tokens")
    odd = [item for item in value if not is_whole_number(item) or not 0 <= item < 2**63]
    if odd:
        raise ConfigError(f"{name} names the token {format_value(odd[0])}; whole numbers from 0 are expected")
    if len(set(value)) < len(value):
        repeated, _ = Counter(value).most_common(1)[0]
        raise ConfigError(f"{name} names the token {repeated} more than once", hint="a row is trained once")
    return tuple(value)
