"""Values read as the types that another library's dataclass declares, down to the items of lists and mappings."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from lora_kit.errors import RecipeError, listed, nearest
from lora_kit.train.values import as_one_of, coerced, kinds_of, known, parsed

NAMES: Final = re.compile(r"[\w.-]+(,[\w.-]+)*")
"""A bare name, or several: as a regular expression it could only match a module at the top, so names are meant."""


def typed(name: str, hint: Any, value: Any) -> Any:
    """The value as its type says, as JSON values; strings (from flags, and from YAML) are read as that type.

    Where either names or an expression may stand, a bare word or `a,b` means names.

    Raises:
        RecipeError: it cannot be; names the item that is wrong.
    """
    kinds = kinds_of(hint)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    kinds = [kind for kind in kinds if typing.get_origin(kind) is not Literal]
    if any(_is_meant(word, value) for word in words):
        return value
    if words and (not kinds or (isinstance(value, str) and value.lower() not in ("true", "false", "none", "null"))):
        raise RecipeError(
            f"{name} {value!r} is not known", hint=nearest(str(value), words) or f"known: {_shown(words)}"
        )
    classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if classes and value is not None:
        return typed_fields(classes[0], coerced(name, dict, value), where=f"{name}.")
    lists = [kind for kind in kinds if typing.get_origin(kind) in (list, tuple)]
    if lists and isinstance(value, str):
        value = _as_list(name, value, names_only=str not in kinds)
    plain = [list if kind in lists else kind for kind in kinds]
    return _items(name, kinds, as_one_of(name, plain, value))


def typed_fields(kind: Any, given: Mapping[str, Any], *, where: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass, each as its type says.

    Args:
        where: what stands before a key in messages.
        without: fields that may not be given.

    Raises:
        RecipeError: a key is unknown (the nearest is named), or a value does not fit.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init and field.name not in without]
    known(given, names, where=where)
    return {key: typed(f"{where}{key}", hints[key], value) for key, value in given.items()}


def _is_meant(word: Any, value: Any) -> bool:
    """Whether a value is this word; one that ends in `[what]` has a number there."""
    start, bracket, _ = str(word).partition("[")
    return bool(value == word or (bracket and str(value).removeprefix(start).isdecimal()))


def _shown(words: Sequence[Any]) -> str:
    return listed([str(word) for word in words], most=12)


def _as_list(name: str, value: str, *, names_only: bool) -> Any:
    """A list that was written as a string; an expression stays one, where one may stand."""
    if value.startswith("["):
        return parsed(name, value)
    if value != "all-linear" and (names_only or NAMES.fullmatch(value)):
        return value.split(",") if value.lower() not in ("none", "null") else value
    return value


def _items(name: str, kinds: Sequence[Any], found: Any) -> Any:
    """What a list or a mapping holds, each item as its type says."""
    origin = list if isinstance(found, list) else dict if isinstance(found, dict) else None
    holders = (list, tuple) if origin is list else (dict,)
    inside = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) in holders]
    if origin is None or not inside or not inside[0]:
        return found
    if origin is dict:
        return {key: typed(f"{name}.{key}", inside[0][1], item) for key, item in found.items()}
    if any(typing.get_origin(kind) is tuple for kind in kinds) and len(found) != len(inside[0]):
        raise RecipeError(f"{name} must have {len(inside[0])} items; {found!r} was given")
    return [typed(f"{name}[{place}]", inside[0][0], item) for place, item in enumerate(found)]
