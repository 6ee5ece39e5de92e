"""The adapter that a training starts from: its config is the recipe's, its values are those of the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.bank.bank import AdapterBank
from lora_kit.errors import RecipeError, format_list
from lora_kit.training.recipe.recipe import Recipe

_FREE_FIELDS: Final = ("lora_dropout", "base_model_name_or_path", "revision", "task_type", "inference_mode")
"""Fields of a config in which the recipe may differ: they do not say what the tensors mean."""


def load_starting_adapter(recipe: Recipe) -> Adapter | None:
    """Return the adapter that a recipe starts from; None where it starts afresh.

    Raises:
        RecipeError: the recipe's config is another one.
        LoraKitError: the adapter cannot be read.
    """
    if recipe.start_from is None:
        return None
    adapter = Adapter.load(recipe.start_from)
    _check_config(recipe, adapter)
    return adapter


def _check_config(recipe: Recipe, adapter: Adapter) -> None:
    names = [field.name for field in dataclasses.fields(recipe.lora) if field.name not in _FREE_FIELDS]
    others = [name for name in names if getattr(recipe.lora, name) != getattr(adapter.config, name)]
    if others:
        what = f"{recipe.start_from} has other values of {format_list([f'lora.{name}' for name in others])}"
        hint = "leave them out: they are the adapter's; lora-kit resize gives it a smaller rank"
        raise RecipeError(f"from: {what} than the recipe", hint=hint)


def check_starting_labels(start: Adapter | None, labels: Sequence[str]) -> None:
    """Raise RecipeError where the labels of an adapter are not those of the rows, in the same order."""
    known = start.record.get("labels") if start is not None else None
    if isinstance(known, Sequence) and list(known) != list(labels):
        what = f"the adapter's labels are {format_list(list(map(str, known)))}, those of the rows {format_list(labels)}"
        raise RecipeError(f"from: {what}", hint="the same labels in the same order, or a new adapter")


def name_start(name: str) -> str:
    """Return the name in the bank of the adapter as it was at the start of the training of another."""
    return f"{name}.start"


def fill_from_start(bank: AdapterBank, name: str, start: Adapter, *, keep: bool) -> None:
    """Give a trainable adapter the values of the one it starts from, after a check that this fits the base.

    Args:
        name: of the trainable adapter.
        keep: whether the adapter stays in the bank, by `name_start`, as the reference of an objective.

    Raises:
        BaseMismatchError, AdapterError: it was made for another base, or does not fit this one.
    """
    bank.load(name_start(name), start)
    bank.restore(name, start)
    if not keep:
        bank.unload(name_start(name))
