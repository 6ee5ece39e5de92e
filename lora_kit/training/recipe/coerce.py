"""Values as people write them, in YAML and in flags, read as the type that a key has."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from lora_kit.errors import RecipeError, format_list, suggest_nearest

NAME_LIST_PATTERN: Final = re.compile(r"[\w.-]+(,[\w.-]+)*")
"""A bare name, or several: as a regular expression it could only match a module at the top, so names are meant."""


def coerce_nested(name: str, hint: Any, value: Any) -> Any:
    """The value as its type says, as JSON values; strings (from flags, and from YAML) are read as that type.

    Where either names or an expression may stand, a bare word or `a,b` means names.

    Raises:
        RecipeError: it cannot be; names the item that is wrong.
    """
    kinds = union_members_of(hint)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    kinds = [kind for kind in kinds if typing.get_origin(kind) is not Literal]
    if any(_is_literal_value(word, value) for word in words):
        return value
    if words and (not kinds or (isinstance(value, str) and value.lower() not in ("true", "false", "none", "null"))):
        raise RecipeError(
            f"{name} {value!r} is not known",
            hint=suggest_nearest(str(value), words) or f"known: {_format_choices(words)}",
        )
    classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if classes and value is not None:
        return coerce_fields(classes[0], coerce_value(name, dict, value), where=f"{name}.")
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    if lists and isinstance(value, str):
        value = _split_list(name, value, names_only=str not in kinds)
    plain = [list if kind in lists else kind for kind in kinds]
    return _coerce_items(name, kinds, coerce_to_one_of(name, plain, value))


def coerce_fields(kind: Any, given: Mapping[str, Any], *, where: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, each as its type says.

    Args:
        where: what stands before a key in messages.
        without: fields that may not be given.

    Raises:
        RecipeError: a key is unknown (the nearest is named), or a value does not fit.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init and field.name not in without]
    check_known_keys(given, names, where=where)
    return {key: coerce_nested(f"{where}{key}", hints[key], value) for key, value in given.items()}


def _is_literal_value(word: Any, value: Any) -> bool:
    """Whether a value is this word; one that ends in `[what]` has a number there."""
    start, bracket, _ = str(word).partition("[")
    return bool(value == word or (bracket and str(value).removeprefix(start).isdecimal()))


def _format_choices(words: Sequence[Any]) -> str:
    return format_list([str(word) for word in words], most=12)


def _split_list(name: str, value: str, *, names_only: bool) -> Any:
    """A list that was written as a string; an expression stays one, where one may stand."""
    if value.startswith("["):
        return parse_yaml(name, value)
    if value != "all-linear" and (names_only or NAME_LIST_PATTERN.fullmatch(value)):
        return value.split(",") if value.lower() not in ("none", "null") else value
    return value


def _coerce_items(name: str, kinds: Sequence[Any], found: Any) -> Any:
    """What a list or a mapping holds, each item as its type says."""
    origin = list if isinstance(found, list) else dict if isinstance(found, dict) else None
    holders = (list, tuple) if origin is list else (dict,)
    inside = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) in holders]
    if origin is None or not inside or not inside[0]:
        return found
    if origin is dict:
        return {key: coerce_nested(f"{name}.{key}", inside[0][1], item) for key, item in found.items()}
    if any(typing.get_origin(kind) is tuple for kind in kinds) and len(found) != len(inside[0]):
        raise RecipeError(f"{name} must have {len(inside[0])} items; {found!r} was given")
    return [coerce_nested(f"{name}[{place}]", inside[0][0], item) for place, item in enumerate(found)]


class StrictYamlLoader(yaml.SafeLoader):
    """YAML as people mean it: `2e-4` is a number, `no` and `on` are words, and a key stands there once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"the key {key!r} in line {key_node.start_mark.line + 1} is not a word")
            if key in seen:
                raise yaml.YAMLError(
                    f"the key {key!r} stands there twice, again in line {key_node.start_mark.line + 1}"
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


StrictYamlLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in found if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    ]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")
)
StrictYamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


_BOOL_WORDS: Final[Mapping[str, bool]] = {
    "true": True,
    "false": False,
    "yes": True,
    "no": False,
    "on": True,
    "off": False,
}


def coerce_value(name: str, hint: Any, value: Any) -> Any:
    """The value as the type of its key; strings (from flags, and from YAML) are read as that type.

    Raises:
        RecipeError: it cannot be.
    """
    return coerce_to_one_of(name, union_members_of(hint), value)


def union_members_of(hint: Any) -> list[Any]:
    """The members of a union; anything else alone."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def coerce_to_one_of(name: str, kinds: Sequence[Any], value: Any) -> Any:
    """The value as one of some types, the narrowest that it can be.

    Raises:
        RecipeError: it can be none of them.
    """
    if type(None) in kinds and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    if choices:
        return _coerce_enum(name, choices[0], value)
    for kind in sorted((typing.get_origin(kind) or kind for kind in kinds), key=_rank_narrowness):
        read = _READERS.get(kind)
        found = read(name, value) if read else None
        if found is not None:
            return found
    expected = " or ".join(
        _TYPE_WORDS[kind] for kind in _TYPE_WORDS if kind in {typing.get_origin(k) or k for k in kinds}
    )
    raise RecipeError(f"{name} must be {expected or 'another kind of value'}; {value!r} was given")


def _rank_narrowness(kind: Any) -> int:
    order = [bool, int, float, list, dict, str]
    return order.index(kind) if kind in order else len(order)


def _coerce_enum(name: str, kind: type[enum.Enum], value: Any) -> str:
    known = [str(member.value) for member in kind]
    word = str(value.value if isinstance(value, enum.Enum) else value)
    if word not in known:
        raise RecipeError(
            f"{name} {word!r} is not known",
            hint=suggest_nearest(word, known) or f"known: {format_list(known, most=20)}",
        )
    return word


def _as_bool(name: str, value: Any) -> bool | None:
    return _BOOL_WORDS.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def _as_int(name: str, value: Any) -> int | None:
    number = _as_float(name, value)
    return None if number is None or number != int(number) else int(number)


def _as_float(name: str, value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    # What was written as a whole number stays one, in the saved recipe too.
    whole = isinstance(value, int) or (isinstance(value, str) and value.strip("+-").isdecimal())
    return int(value) if whole else number


def _as_str(name: str, value: Any) -> str | None:
    return str(value) if isinstance(value, (str, Path)) else None


def _as_list(name: str, value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.startswith("["):
        value = parse_yaml(name, value)
    return list(value) if isinstance(value, (list, tuple)) else None


def _as_dict(name: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str) and value.startswith("{"):
        value = parse_yaml(name, value)
    return dict(value) if isinstance(value, Mapping) else None


_READERS: Final[Mapping[Any, Callable[[str, Any], Any]]] = {
    bool: _as_bool,
    int: _as_int,
    float: _as_float,
    str: _as_str,
    list: _as_list,
    dict: _as_dict,
    Mapping: _as_dict,
    typing.get_origin(Mapping[str, int]): _as_dict,
}
_TYPE_WORDS: Final[Mapping[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    typing.get_origin(Mapping[str, int]): "a mapping",
}


def parse_yaml(name: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=StrictYamlLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: {text!r} cannot be parsed: {' '.join(str(error).split())}") from None


def check_known_keys(given: Mapping[str, Any], names: Sequence[str], *, where: str) -> None:
    unknown = [key for key in given if key not in names]
    if unknown:
        close = suggest_nearest(str(unknown[0]), names)
        raise RecipeError(
            f"unknown key {where}{unknown[0]}", hint=close or f"known: {format_list(sorted(names), most=12)}"
        )


def coerce_mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} must be a mapping of keys to values; {value!r} was given")
    return dict(value)


def check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RecipeError(
            f"{name} {value!r} is not known", hint=suggest_nearest(str(value), known) or f"known: {format_list(known)}"
        )


def copy_nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy_nested(value) if isinstance(value, Mapping) else value for key, value in fields.items()}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
