"""The files of a recipe: `data.train: path`, or a list of paths and of `{path, weight}`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_kit.data.mixture import MAX_WEIGHT, DataFile, DataSource, list_files
from lora_kit.errors import RecipeError
from lora_kit.io.text import format_value
from lora_kit.training.recipe.coerce import check_known_keys, coerce_value
from lora_kit.training.recipe.strict_yaml import parse_yaml


def parse_data_files(name: str, value: object) -> DataSource:
    """Return the file or the files that a key of a recipe names; a flag may give a list as YAML: `[a.jsonl, b.jsonl]`.

    Args:
        name: the key, for messages.

    Raises:
        RecipeError: the value is neither a path nor a list of paths and of `{path, weight}`.
    """
    if isinstance(value, str) and value.startswith("["):
        value = parse_yaml(name, value)
    if isinstance(value, (str, Path)):
        return str(value)
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{name} must be a path or a list of files; {format_value(value)} was given")
    return tuple(_parse_file(f"{name}[{index}]", item) for index, item in enumerate(value))


def _parse_file(name: str, item: object) -> DataFile:
    if isinstance(item, DataFile):
        return item
    if isinstance(item, (str, Path)):
        return DataFile(str(item))
    if not isinstance(item, Mapping) or "path" not in item:
        raise RecipeError(
            f"{name} must be a path or a mapping with path and perhaps weight; {format_value(item)} was given"
        )
    check_known_keys(item, ("path", "weight"), where=f"{name}.")
    path = coerce_value(f"{name}.path", str, item["path"])
    weight = item.get("weight")
    return DataFile(path) if weight is None else DataFile(path, coerce_value(f"{name}.weight", float, weight))


def check_data_files(train: DataSource, validation: DataSource | None) -> None:
    """Raise RecipeError for a path or a list that is empty, or an invalid weight."""
    for name, source in (("data.train", train), ("data.validation", validation)):
        if source is None:
            continue
        files = list_files(source)
        if not files or not all(file.path.strip() for file in files):
            raise RecipeError(f"{name} must not be empty", hint="it is a file of rows, or a list of files")
        for file in files:
            _check_weight(name, file)


def _check_weight(name: str, file: DataFile) -> None:
    if not 0 < file.weight <= MAX_WEIGHT:
        what = (
            f"{name}: the weight of {file.path} must be above 0 and at most {MAX_WEIGHT:,}; {file.weight:g} was given"
        )
        raise RecipeError(what, hint="it is how many times the rows are taken")
    if name == "data.validation" and file.weight != 1:
        raise RecipeError(f"{name}: {file.path} has a weight, but every row is validated on once", hint="leave it out")


def describe_data_files(source: DataSource | None) -> object:
    """Return what a recipe's file says of a source, from which `parse_data_files` builds it again."""
    if source is None or isinstance(source, str):
        return source
    return [file.path if file.weight == 1 else {"path": file.path, "weight": file.weight} for file in source]
