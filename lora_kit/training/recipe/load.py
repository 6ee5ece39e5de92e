"""Recipes read from YAML, TOML, a mapping or flags: every key is known, every value has its key's type."""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import yaml

from lora_kit.adapter.adapter import Adapter
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, RecipeError, find_nearest, format_list, suggest_nearest
from lora_kit.io.read import exists, read_text
from lora_kit.io.text import escape_text, format_value, shorten
from lora_kit.training.recipe.coerce import (
    Section,
    check_known_keys,
    check_mapping,
    coerce_fields,
    coerce_value,
    copy_nested,
)
from lora_kit.training.recipe.data_files import parse_data_files
from lora_kit.training.recipe.limits import check_values
from lora_kit.training.recipe.method_switch import switch_method
from lora_kit.training.recipe.recipe import HEAD, DataSpec, Recipe
from lora_kit.training.recipe.strict_yaml import load_yaml
from lora_kit.training.recipe.train_keys import OWN_FIELDS, UNSUPPORTED_KEYS
from lora_kit.training.recipe.training_arguments import get_training_argument_types

_SIZE_LIMIT: Final = 2**20
"""Bytes of a recipe's file, at most."""
_MAX_SHOWN_PATH: Final = 160
_TYPING_ERROR: Final = 0.7
"""Share of the letters that a key and a mistyped one have in common."""
_PLAIN_FIELDS: Final = (
    "base",
    "out",
    "task",
    "problem",
    "objective",
    "method",
    "dtype",
    "quantize",
    "compile",
    "start_from",
)
"""Fields of a recipe that hold one value, not a section."""

_KEYS: Final[Mapping[str, str]] = {"start_from": "from"}
"""Keys of a recipe that Python does not allow as names of attributes, by attribute."""
_ATTRIBUTES: Final[Mapping[str, str]] = {key: name for name, key in _KEYS.items()}

RecipeSource: TypeAlias = str | Path | Section | Recipe
"""A YAML or TOML file, what stands in one, or a recipe."""


def load_recipe(source: RecipeSource, *, overrides: Section | None = None) -> Recipe:
    """Return the recipe that a YAML or TOML file, a mapping or a recipe describes; overrides win.

    Args:
        source: the file (`.yaml`, `.yml` or `.toml`), or what stands in one.
        overrides: values by dotted key (`lora.r`, `train.learning_rate`, `out`); strings are parsed as the key's type.

    Raises:
        RecipeError: the file cannot be read, a key is unknown (the nearest is named), or a value is invalid.
    """
    fields, where = read_recipe_fields(source, overrides=overrides)
    try:
        return _build_recipe(fields)
    except RecipeError as error:
        raise RecipeError(f"{where}: {shorten(error.message)}", hint=shorten(error.hint)) from None


def read_recipe_fields(source: RecipeSource, *, overrides: Section | None = None) -> tuple[dict[str, object], str]:
    """Return the fields of a recipe, with overrides but without defaults, and the name of its source for messages."""
    if isinstance(source, Recipe):
        fields, where = source.to_dict(), "the recipe"
    elif isinstance(source, Mapping):
        check_values(source, where="the recipe")
        fields, where = copy_nested(source), "the recipe"
    else:
        _check_is_path(source)
        fields, where = _read_recipe_file(Path(source)), _name_file(source)
        check_values(fields, where=where)
    check_values(check_mapping("the overrides", overrides or {}), where="the overrides")
    fields = switch_method(fields, overrides or {})
    for key, value in (overrides or {}).items():
        if not isinstance(key, str):
            raise RecipeError(f"the override {format_value(key)} is not a key", hint="for example 'lora.r'")
        _override(fields, key, value)
    return fields, where


def _name_file(path: object) -> str:
    """Return the path of a recipe for messages: its end, where it is long."""
    text = escape_text(path)
    return text if len(text) <= _MAX_SHOWN_PATH else f"…{text[-_MAX_SHOWN_PATH:]}"


def _check_is_path(source: object) -> None:
    """Raise RecipeError for what is not even the name of a file."""
    if not isinstance(source, (str, os.PathLike)):
        hint = "give the file of a recipe, a mapping or a Recipe"
        raise RecipeError(f"{format_value(source)} was given as a recipe", hint=hint)


def _read_recipe_file(path: Path) -> dict[str, object]:
    """Return the mapping in a recipe's file."""
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise RecipeError(f"{_name_file(path)}: a recipe is a .yaml, .yml or .toml file")
    if not exists(path):
        siblings = [str(item) for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"{_name_file(path)}: no such file", hint=suggest_nearest(str(path), siblings))
    try:
        text = read_text(path.resolve(), limit=_SIZE_LIMIT)
    except AdapterError as error:
        raise RecipeError(error.message, hint=error.hint) from None
    try:
        fields = tomllib.loads(text) if suffix == ".toml" else load_yaml(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{_name_file(path)}: cannot be parsed: {shorten(error)}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"{_name_file(path)}: a mapping was expected, found {type(fields).__name__}")
    return fields


def _override(fields: dict[str, object], key: str, value: object) -> None:
    """Set a dotted key in the fields of a recipe."""
    section, dot, name = key.partition(".")
    if section == "data" and isinstance(fields.get("data"), (str, list)) and dot:
        fields["data"] = {"train": fields["data"]}
    if not dot:
        fields[key] = value
        return
    if section not in ("data", "lora", "peft", "train"):
        known = [f.name for f in dataclasses.fields(Recipe)]
        raise RecipeError(
            shorten(f"--{key}: a recipe has no section {format_value(section)}"),
            hint=suggest_nearest(section, known) or f"known: {format_list(known)}",
        )
    values = {} if fields.get(section) is None else fields[section]
    if not isinstance(values, dict):
        raise RecipeError(f"{section} must be a mapping; {format_value(values)} was given")
    fields[section] = {**values, name: value}


def _build_recipe(fields: Section) -> Recipe:
    names = [_KEYS.get(field.name, field.name) for field in dataclasses.fields(Recipe)]
    _check_top_level_keys(fields, names)
    fields = {_ATTRIBUTES.get(key, key): value for key, value in fields.items()}
    missing = [name for name in ("base", "data", "out") if fields.get(name) is None]
    if missing:
        raise RecipeError(f"{format_list(missing)} missing", hint="a recipe has base, data and out at least")
    values = {key: value for key, value in fields.items() if value is not None}
    if values.get("quantize") == "":
        del values["quantize"]
    hints = typing.get_type_hints(Recipe)
    values |= {name: coerce_value(name, hints[name], values[name]) for name in _PLAIN_FIELDS if name in values}
    values["data"] = _parse_data_section(values["data"])
    lora, peft, train = (values.get(name, {}) for name in ("lora", "peft", "train"))
    method = values.get("method", "lora")
    if method == "peft" and lora:
        raise RecipeError("method peft has no lora section", hint="take it out, or use method lora")
    if not isinstance(lora, LoraConfig):
        lora = _parse_lora_section(check_mapping("lora", lora), method, start=values.get("start_from"))
    sections = {"lora": lora, "peft": check_mapping("peft", peft), "train": check_mapping("train", train)}
    return Recipe(**{**values, **sections})


def _check_top_level_keys(fields: Section, names: Sequence[str]) -> None:
    """Raise RecipeError for a key that a recipe does not have; one that a section of it has is named with the section.

    `lr` is `train.learning_rate`.
    """
    unknown = next((key for key in fields if key not in names), None)
    if not isinstance(unknown, str) or difflib.get_close_matches(unknown, names, cutoff=_TYPING_ERROR):
        check_known_keys(fields, names, where="")
        return
    sections = {
        "train": [*(key for key in get_training_argument_types() if key not in UNSUPPORTED_KEYS), *OWN_FIELDS],
        "lora": [field.name for field in dataclasses.fields(LoraConfig)],
        "data": [field.name for field in dataclasses.fields(DataSpec)],
    }
    dotted = {key: f"{section}.{key}" for section, keys in reversed(sections.items()) for key in keys}
    nearest = find_nearest(unknown, [*names, *(key for keys in sections.values() for key in keys)])
    hint = f"did you mean {dotted.get(nearest, nearest)!r}?" if nearest else f"known: {format_list(names, most=20)}"
    raise RecipeError(shorten(f"unknown key {unknown}"), hint=hint)


def _parse_data_section(section: object) -> DataSpec:
    if isinstance(section, (str, Path, list, tuple)):
        return DataSpec(train=parse_data_files("data", section))
    given = _drop_none(check_mapping("data", section))
    files = {name: parse_data_files(f"data.{name}", given[name]) for name in ("train", "validation") if name in given}
    values = coerce_fields(DataSpec, {key: value for key, value in given.items() if key not in files}, where="data.")
    if "train" not in files:
        raise RecipeError("data.train is missing", hint="it is a file of rows, or a list of files")
    return DataSpec(**{**files, **values})


def _parse_lora_section(section: Section, method: str, *, start: str | None = None) -> LoraConfig:
    values = coerce_fields(LoraConfig, _drop_none(section), where="lora.", without=("extra",))
    if start is not None:
        return _parse_lora_changes(values, start)
    if method == "features":
        # A config must not be empty; the name of the head is known once the model is loaded.
        values = {"target_modules": (), "modules_to_save": (HEAD,), **values}
    try:
        return LoraConfig(**values)
    except ConfigError as error:
        names = [field.name for field in dataclasses.fields(LoraConfig)]
        separator = "." if error.message.partition(" ")[0] in names else ": "
        raise RecipeError(f"lora{separator}{error.message}", hint=error.hint) from None


def _parse_lora_changes(values: Section, start: str) -> LoraConfig:
    """Return the config of an adapter, with what a recipe changes in it; the job checks that it may."""
    try:
        return dataclasses.replace(Adapter.load(start).config, **values)
    except ConfigError as error:
        raise RecipeError(f"lora: {error.message}", hint=error.hint) from None
    except AdapterError as error:
        raise RecipeError(f"from: {error.message}", hint=error.hint) from None


def _drop_none(section: Section) -> Section:
    """Return a section without the keys that were left open."""
    return {key: value for key, value in section.items() if value is not None}
