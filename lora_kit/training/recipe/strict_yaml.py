"""YAML as people mean it: `2e-4` is a number, `no` and `on` are strings, and no key occurs twice.

A document of any bytes gives a value or one error, in bounded time and memory: nodes and levels are counted while they
are read, and tags, which would choose the type of a value, are not taken.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Final

import yaml

from lora_kit.errors import RecipeError
from lora_kit.io.text import MAX_DIGITS, format_value, shorten

MAX_NODES: Final = 10_000
"""Values that a document may have, at most."""
MAX_LEVELS: Final = 32
"""Levels of mappings and lists in a document, at most."""
_WHOLE_NUMBER: Final = "tag:yaml.org,2002:int"


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that takes only strings as keys, and each of them once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(
                f"a tag ({format_value(event.tag)}) in line {line}: the key decides the type of a value"
            )
        self._nodes, self._level = self._nodes + 1, self._level + 1
        if self._nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES:,} values, by line {line}")
        if self._level > MAX_LEVELS:
            raise yaml.YAMLError(f"nested more than {MAX_LEVELS} levels deep in line {line}")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"<< in line {line} is not read: write the values themselves")
            key = self.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {format_value(key)} in line {line} is not a string")
            if key in seen:
                raise yaml.YAMLError(f"the key {format_value(key)} occurs twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = len(node.value)
        if digits > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {digits:,} digits in line {node.start_mark.line + 1}")
        return super().construct_yaml_int(node)


_StrictLoader.add_constructor(_WHOLE_NUMBER, _StrictLoader.construct_yaml_int)
_REPLACED_TAGS: Final = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp", _WHOLE_NUMBER)
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")
)
# Without numbers to the base 60: `12:30` is a text.
_StrictLoader.add_implicit_resolver(
    _WHOLE_NUMBER, re.compile(r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def load_yaml(text: str) -> object:
    """Return the value that a YAML document holds.

    Aliases share the value that they name; whoever walks the result has to count.

    Raises:
        yaml.YAMLError: the text is not YAML, has a tag, or is too large; or a key is not a string or occurs twice.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
        # What the library's constructors make of text that looks like a number, such as `0b_`.
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def parse_yaml(name: str, text: str) -> object:
    """Return the value of the key `name` that was written as YAML.

    Raises:
        RecipeError: the text cannot be parsed.
    """
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: {format_value(text)} cannot be parsed: {shorten(error)}") from None
