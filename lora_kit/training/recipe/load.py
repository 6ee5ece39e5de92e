"""Recipes from YAML, TOML, a mapping or flags: every key known, every value of its key's type."""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import AdapterError, ConfigError, RecipeError, format_list, suggest_nearest
from lora_kit.io.read import exists, read_text
from lora_kit.io.text import escape_text
from lora_kit.training.recipe.coerce import (
    NAME_LIST_PATTERN,
    StrictYamlLoader,
    check_known_keys,
    coerce_mapping,
    coerce_value,
    copy_nested,
    parse_yaml,
)
from lora_kit.training.recipe.recipe import HEAD, DataSpec, Recipe

_SIZE_LIMIT: Final = 2**20
_LIST_FIELDS: Final = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "trainable_token_indices",
)


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, *, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe from a YAML or TOML file, a mapping, or a recipe; overrides win.

    Args:
        source: the file (`.yaml`, `.yml` or `.toml`), or what stands in one.
        overrides: values by dotted key (`lora.r`, `train.learning_rate`, `out`); strings are read as the key's type.

    Raises:
        RecipeError: the file cannot be read, a key is unknown (the nearest is named), or a value does not fit.
    """
    fields, where = read_recipe_fields(source, overrides=overrides)
    try:
        return _build_recipe(fields)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from None


def read_recipe_fields(
    source: str | Path | Mapping[str, Any] | Recipe, *, overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], str]:
    """What stands in a recipe, with overrides but without defaults; and where it stands."""
    if isinstance(source, Recipe):
        fields, where = source.to_dict(), "the recipe"
    elif isinstance(source, Mapping):
        fields, where = copy_nested(source), "the recipe"
    else:
        fields, where = _read_recipe_file(Path(source)), str(source)
    for key, value in (overrides or {}).items():
        _override(fields, key, value)
    return fields, where


def _read_recipe_file(path: Path) -> dict[str, Any]:
    """The mapping in a recipe's file."""
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".toml"):
        raise RecipeError(f"{path}: a recipe is a .yaml, .yml or .toml file")
    if not exists(path):
        here = [str(path.parent / item.name) for item in path.parent.iterdir()] if path.parent.is_dir() else []
        raise RecipeError(f"{escape_text(path)}: no such file", hint=suggest_nearest(str(path), here))
    try:
        text = read_text(path.resolve(), limit=_SIZE_LIMIT)
    except AdapterError as error:
        raise RecipeError(error.message, hint=error.hint) from None
    try:
        fields = tomllib.loads(text) if suffix == ".toml" else yaml.load(text, Loader=StrictYamlLoader)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be parsed: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a mapping was expected, found {type(fields).__name__}")
    return fields


def _override(fields: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key of the fields of a recipe."""
    section, dot, name = key.partition(".")
    if section == "data" and isinstance(fields.get("data"), str) and dot:
        fields["data"] = {"train": fields["data"]}
    if not dot:
        fields[key] = value
        return
    if section not in ("data", "lora", "peft", "train"):
        known = [f.name for f in dataclasses.fields(Recipe)]
        raise RecipeError(
            f"--{key}: a recipe has no section {section!r}",
            hint=suggest_nearest(section, known) or f"known: {format_list(known)}",
        )
    inside = fields.setdefault(section, {})
    if inside is None:
        inside = fields[section] = {}
    if not isinstance(inside, dict):
        raise RecipeError(f"{section} must be a mapping; {inside!r} was given")
    inside[name] = value


def _build_recipe(fields: Mapping[str, Any]) -> Recipe:
    check_known_keys(fields, [f.name for f in dataclasses.fields(Recipe)], where="")
    missing = [name for name in ("base", "data", "out") if fields.get(name) is None]
    if missing:
        raise RecipeError(f"{format_list(missing)} missing", hint="a recipe has base, data and out at least")
    values = {key: value for key, value in fields.items() if value is not None}
    method = values.get("method", "lora")
    for name in ("base", "out", "task", "method", "dtype", "quantize"):
        if name in values:
            values[name] = coerce_value(name, str, values[name])
    if "compile" in values:
        values["compile"] = coerce_value("compile", bool, values["compile"])
    if values.get("quantize") in ("none", "null", ""):
        del values["quantize"]
    values["data"] = _parse_data_section(values["data"])
    if method == "peft" and values.get("lora"):
        raise RecipeError("method peft has no lora section", hint="take it out, or use method lora")
    values["peft"] = coerce_mapping("peft", values.get("peft", {}))
    if not isinstance(values.get("lora"), LoraConfig):
        values["lora"] = _parse_lora_section(coerce_mapping("lora", values.get("lora", {})), method)
    values["train"] = coerce_mapping("train", values.get("train", {}))
    return Recipe(**values)


def _parse_data_section(given: Any) -> DataSpec:
    if isinstance(given, (str, Path)):
        return DataSpec(train=str(given))
    section = coerce_mapping("data", given)
    hints = typing.get_type_hints(DataSpec)
    check_known_keys(section, list(hints), where="data.")
    values = {
        key: coerce_value(f"data.{key}", hints[key], value) for key, value in section.items() if value is not None
    }
    if "train" not in values:
        raise RecipeError("data.train is missing", hint="it is a file of rows")
    return DataSpec(**values)


def _parse_lora_section(section: Mapping[str, Any], method: str) -> LoraConfig:
    hints = {key: hint for key, hint in typing.get_type_hints(LoraConfig).items() if key != "extra"}
    check_known_keys(section, list(hints), where="lora.")
    values = {key: _parse_lora_value(key, hints[key], value) for key, value in section.items() if value is not None}
    if method == "features":
        # A config must hold something; what the head is called is known once the model is there.
        values = {"target_modules": (), "modules_to_save": (HEAD,), **values}
    try:
        return LoraConfig(**values)
    except ConfigError as error:
        dot = "." if error.message.partition(" ")[0] in hints else ": "
        raise RecipeError(f"lora{dot}{error.message}", hint=error.hint) from None


def _parse_lora_value(key: str, hint: Any, value: Any) -> Any:
    listable = key in _LIST_FIELDS
    if isinstance(value, str) and listable and value != "all-linear":
        if value.startswith(("[", "{")):
            value = parse_yaml(f"lora.{key}", value)
        elif NAME_LIST_PATTERN.fullmatch(value):
            # A bare name as a regular expression could only match a module at the top: names are meant.
            value = value.split(",")
        if key in ("layers_to_transform", "trainable_token_indices") and isinstance(value, list):
            value = [coerce_value(f"lora.{key}", int, item) for item in value]
    if listable:
        return tuple(value) if isinstance(value, list) else value
    return coerce_value(f"lora.{key}", hint, value)
