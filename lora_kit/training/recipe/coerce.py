"""Values as people write them, in YAML and in flags, converted to the type that their key has.

`coerce_value` converts one value, `coerce_fields` the fields of a dataclass. The types are annotations as
`typing.get_type_hints` returns them: of `DataSpec`, `LoraConfig`, transformers.TrainingArguments and PEFT's configs.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from lora_kit.errors import RecipeError, format_list, sort_by_similarity, suggest_nearest
from lora_kit.io import text
from lora_kit.io.text import format_value, parse_number, shorten
from lora_kit.training.recipe.strict_yaml import parse_yaml

Section: TypeAlias = Mapping[str, Any]
"""A section of a recipe by key. The type of a value is that of the field it is checked against, at run time."""

_NAMES: Final = re.compile(r"[\w.-]+(,[\w.-]+)*")
"""One name, or several with commas. As a regular expression over whole paths it could match only a top-level module."""
_NONE_WORDS: Final = ("none", "null")
_BOOL_WORDS: Final[Mapping[str, bool]] = {
    "true": True,
    "false": False,
    "yes": True,
    "no": False,
    "on": True,
    "off": False,
}


# One value


def coerce_value(name: str, hint: object, value: object, *, split_names: bool = True) -> Any:
    """Return a value converted to the type of its key, as a JSON value.

    A string is parsed as that type: `8`, `1e-3`, `true`, `none`, `[a, b]`, `{a: 1}`, `a,b`.

    Args:
        name: the key, for messages.
        hint: the type, as in a class's annotations.
        split_names: whether `a` or `a,b` is a list of names where either names or one expression may be given.

    Raises:
        RecipeError: the value does not have that type; names the item that is wrong.
    """
    kinds = union_members_of(hint)
    if Any in kinds or object in kinds:
        return value
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    kinds = [kind for kind in kinds if typing.get_origin(kind) is not Literal]
    if any(_is_literal_value(word, value) for word in words):
        return value
    is_word = isinstance(value, str) and not _is_one_of(value, ("true", "false", *_NONE_WORDS))
    if words and (is_word or not kinds):
        raise _unknown_value_error(name, value, [str(word) for word in words])
    if type(None) in kinds and (value is None or _is_one_of(value, _NONE_WORDS)):
        return None
    config_classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if config_classes:
        return coerce_fields(config_classes[0], coerce_value(name, dict, value), where=f"{name}.")
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    if enums:
        return _coerce_enum(name, enums[0], value)
    return _coerce_to_narrowest(name, kinds, _split_list(name, kinds, value, split_names=split_names))


def coerce_fields(config_class: Any, values: Section, *, where: str, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass, each converted to its type.

    Args:
        config_class: the dataclass.
        where: the prefix of keys in messages.
        without: fields that may not be set.

    Raises:
        RecipeError: a key is unknown (the nearest is named), or a value does not have its field's type.
    """
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class) if field.init and field.name not in without]
    check_known_keys(values, names, where=where)
    return {key: coerce_value(f"{where}{key}", hints[key], value) for key, value in values.items()}


def union_members_of(hint: object) -> list[object]:
    """Return the members of a union type; any other type alone."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if is_union else [hint]


def _coerce_to_narrowest(name: str, kinds: Sequence[object], value: object) -> object:
    """Return a value as the narrowest of some types that it can have."""
    plain = {_plain_type_of(kind): kind for kind in kinds}
    for parse in (parser for kind, parser in _PARSERS.items() if kind in plain):
        result = parse(name, value)
        if result is not None:
            return _coerce_items(name, kinds, result)
    expected = " or ".join(_TYPE_WORDS[kind] for kind in _TYPE_WORDS if kind in plain)
    raise RecipeError(f"{name} must be {expected or 'another kind of value'}; {format_value(value)} was given")


def _plain_type_of(kind: object) -> object:
    """Return the class whose values JSON has for a type: `list` for a tuple, `dict` for any mapping."""
    plain = typing.get_origin(kind) or kind
    if isinstance(plain, type) and issubclass(plain, Mapping):
        return dict
    return list if plain is tuple else plain


def _coerce_items(name: str, kinds: Sequence[object], value: object) -> object:
    """Return a list or a mapping with each item converted to its type; any other value as it is."""
    if not isinstance(value, (list, dict)):
        return value
    holder = next(kind for kind in kinds if _plain_type_of(kind) is type(value))
    item_types = typing.get_args(holder)
    if not item_types:
        return value
    if isinstance(value, dict):
        return {key: coerce_value(f"{name}.{key}", item_types[1], item) for key, item in value.items()}
    if typing.get_origin(holder) is tuple and Ellipsis not in item_types and len(value) != len(item_types):
        raise RecipeError(f"{name} must have {len(item_types)} items; {format_value(value)} was given")
    return [coerce_value(f"{name}[{index}]", item_types[0], item) for index, item in enumerate(value)]


def _split_list(name: str, kinds: Sequence[object], value: object, *, split_names: bool) -> object:
    """Return the list that a string or a single number stands for where a list may be given; else the value."""
    plain = [_plain_type_of(kind) for kind in kinds]
    if list not in plain:
        return value
    if type(value) is int and not {int, float} & set(plain):
        return [value]
    if not isinstance(value, str) or value == "all-linear" or value.startswith(("[", "{")):
        return value
    names_only = str not in plain
    return value.split(",") if names_only or (split_names and _NAMES.fullmatch(value)) else value


def _is_literal_value(word: object, value: object) -> bool:
    """Return whether a value is this word; a word that ends in `[…]` has a number there."""
    start, bracket, _ = str(word).partition("[")
    return bool(value == word or (bracket and str(value).removeprefix(start).isdecimal()))


def _is_one_of(value: object, words: Collection[str]) -> bool:
    return isinstance(value, str) and value.lower() in words


def _coerce_enum(name: str, kind: type[enum.Enum], value: object) -> str:
    known = [str(member.value) for member in kind]
    word = str(value.value if isinstance(value, enum.Enum) else value)
    if word not in known:
        raise _unknown_value_error(name, word, known, most=20)
    return word


def _unknown_value_error(name: str, value: object, known: Sequence[str], *, most: int = 12) -> RecipeError:
    hint = suggest_nearest(str(value), known) or f"known: {format_list(list(known), most=most)}"
    return RecipeError(f"{name} {format_value(value)} is not known", hint=hint)


# Parsers: each returns the value as its type, or None where the value is of another type


def _parse_bool(name: str, value: object) -> bool | None:
    return _BOOL_WORDS.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def _parse_int(name: str, value: object) -> int | None:
    number = _parse_float(name, value)
    return None if number is None or number != int(number) else int(number)


def _parse_float(name: str, value: object) -> float | None:
    number = parse_number(value)
    # A number that was written as a whole number stays one, in the saved recipe too.
    if number is not None and (isinstance(value, int) or (isinstance(value, str) and value.strip("+-").isdecimal())):
        return int(value)
    return number


def _parse_list(name: str, value: object) -> list[object] | None:
    if isinstance(value, str) and value.startswith("["):
        value = parse_yaml(name, value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, (list, tuple)) else None


def _parse_dict(name: str, value: object) -> dict[str, object] | None:
    if isinstance(value, str) and value.startswith("{"):
        value = parse_yaml(name, value)
    return dict(value) if isinstance(value, Mapping) else None


def _parse_str(name: str, value: object) -> str | None:
    return str(value) if isinstance(value, (str, Path)) else None


_PARSERS: Final[Mapping[object, Callable[[str, object], object]]] = {
    bool: _parse_bool,
    int: _parse_int,
    float: _parse_float,
    list: _parse_list,
    dict: _parse_dict,
    str: _parse_str,
}
"""From the narrowest type to the widest: `8` is an int where both an int and a string may be given."""
_TYPE_WORDS: Final[Mapping[object, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    list: "a list",
    dict: "a mapping",
}


# Checks


def check_known_keys(values: Section, names: Sequence[str], *, where: str) -> None:
    """Raise RecipeError for the first key that is not one of `names`."""
    unknown = [key for key in values if key not in names]
    if unknown:
        word = str(unknown[0])
        hint = suggest_nearest(word, names) or f"known: {format_list(sort_by_similarity(word, names), most=12)}"
        raise RecipeError(shorten(f"unknown key {where}{unknown[0]}"), hint=hint)


def check_mapping(name: str, value: object) -> Section:
    """Return a value that is a mapping; raise RecipeError for any other."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} must be a mapping of keys to values; {format_value(value)} was given")
    return value


def check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raise RecipeError unless a value is one of those known; the nearest is named."""
    text.check_one_of(name, value, known, error=RecipeError)


# Copies


def copy_nested(values: Section) -> dict[str, object]:
    """Return a copy of nested mappings; what is in them is shared."""
    return {key: copy_nested(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def as_json(value: object) -> Any:
    """Return a value as JSON values; what JSON does not have becomes a string."""
    return json.loads(json.dumps(value, default=str))
