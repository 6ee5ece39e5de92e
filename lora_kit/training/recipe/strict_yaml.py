"""YAML as people mean it: `2e-4` is a number, `no` and `on` are strings, and no key occurs twice."""

from __future__ import annotations

import re
from collections.abc import Hashable

import yaml

from lora_kit.errors import RecipeError


class _StrictLoader(yaml.SafeLoader):
    """A safe loader that takes only strings as keys, and each of them once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen = set()
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} in line {line} is not a string")
            if key in seen:
                raise yaml.YAMLError(f"the key {key!r} occurs twice, again in line {line}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_REPLACED_TAGS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def load_yaml(text: str) -> object:
    """Return the value that a YAML document holds.

    Raises:
        yaml.YAMLError: the text is not YAML, or a key is not a string or occurs twice.
    """
    return yaml.load(text, Loader=_StrictLoader)


def parse_yaml(name: str, text: str) -> object:
    """Return the value of the key `name` that was written as YAML.

    Raises:
        RecipeError: the text cannot be parsed.
    """
    try:
        return load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: {text!r} cannot be parsed: {' '.join(str(error).split())}") from None
