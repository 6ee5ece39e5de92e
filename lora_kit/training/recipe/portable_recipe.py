"""A recipe as it travels with what was trained: it names no home folder, and no data outside the project."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lora_kit.data.mixture import rename_files
from lora_kit.io.portable_paths import make_folder_portable, make_path_portable
from lora_kit.training.recipe.recipe import Recipe
from lora_kit.training.recipe.reward_specs import rename_reward_files


def make_recipe_portable(recipe: Recipe) -> Recipe:
    """Return a recipe whose paths are relative to the working directory, or names alone; see `portable_paths`.

    It trains the same where it is started in the same folder, if its files are in that folder.
    """
    data, base_label = recipe.data, recipe.lora.base_model_name_or_path
    return recipe.replace(
        base=make_folder_portable(recipe.base),
        out=make_path_portable(recipe.out),
        rewards=rename_reward_files(recipe.rewards, make_path_portable),
        start_from=make_path_portable(recipe.start_from) if recipe.start_from else None,
        data=dataclasses.replace(
            data,
            train=rename_files(data.train, make_path_portable),
            validation=None if data.validation is None else rename_files(data.validation, make_path_portable),
        ),
        lora=dataclasses.replace(
            recipe.lora, base_model_name_or_path=make_folder_portable(base_label) if base_label else None
        ),
        train=_shorten_paths(recipe.train),
        peft=_shorten_paths(recipe.peft),
    )


def _shorten_paths(value: object) -> object:
    """Return a value with every absolute path in it made portable."""
    if isinstance(value, Mapping):
        return {key: _shorten_paths(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten_paths(item) for item in value]
    return make_path_portable(value) if isinstance(value, str) and value.startswith(("/", "~/")) else value
