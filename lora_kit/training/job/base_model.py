"""The base of a training: loaded, or one that is already loaded; a copy where training would change it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from lora_kit.errors import RecipeError
from lora_kit.models.loading import Base, load_base
from lora_kit.models.locate import warn_of_floating_revision
from lora_kit.models.tasks import PROBLEM_TYPES
from lora_kit.training.recipe.recipe import METHODS_CHANGING_BASE, Recipe


class BaseLoader(Protocol):
    """Returns a base in which nothing is trained yet, as `load_recipe_base` does."""

    def __call__(self, recipe: Recipe, label2id: Mapping[str, int], problem: str | None) -> Base: ...


def load_recipe_base(recipe: Recipe, label2id: Mapping[str, int], problem: str | None) -> Base:
    """Load the base of a recipe.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    # Small updates are lost in 16 bits, so every weight is trained in fp32 unless the recipe sets a dtype.
    dtype = "fp32" if recipe.method == "full" and recipe.dtype == "auto" else recipe.dtype
    base = load_base(
        recipe.base,
        task=recipe.task,
        label2id=label2id or None,
        problem=problem,
        dtype=dtype,
        quantize=recipe.quantize,
    )
    warn_of_floating_revision(recipe.base)
    return base


def prepare_base(
    recipe: Recipe,
    base: Base | None,
    label2id: Mapping[str, int],
    problem: str | None = None,
    *,
    load: BaseLoader = load_recipe_base,
) -> Base:
    """Return the base that a recipe trains on.

    Args:
        base: a base that is already loaded; None to load the recipe's.
        load: loads it then.
        label2id: names of the labels to their numbers; empty where the task has none.
        problem: what task `classify` predicts; None for other tasks.

    Raises:
        RecipeError: the loaded base is not the recipe's, or does not go with it.
        BaseModelError: the recipe's base cannot be loaded.
    """
    if base is None:
        return _reserve_virtual_tokens(recipe, load(recipe, label2id, problem))
    return _reserve_virtual_tokens(recipe, _reuse_loaded_base(recipe, base, label2id, problem))


def _reuse_loaded_base(recipe: Recipe, base: Base, label2id: Mapping[str, int], problem: str | None) -> Base:
    """Return a loaded base, checked against the recipe; a copy of it where its weights will change."""
    if (base.name, base.task) != (recipe.base, recipe.task):
        what = f"the recipe is for {recipe.base} ({recipe.task}), the base given is {base.name} ({base.task})"
        raise RecipeError(what, hint="give the recipe's base, or none to have it loaded")
    if recipe.dtype != "auto" or recipe.quantize:
        raise RecipeError("dtype and quantize have no effect on a loaded base", hint="pass them to load_base")
    if label2id and base.model.config.num_labels != len(label2id):
        raise RecipeError(f"the base given has {base.model.config.num_labels} labels, the data {len(label2id)}")
    if recipe.method not in METHODS_CHANGING_BASE:
        return base
    if recipe.method == "full" and getattr(base.model, "is_quantized", False):
        raise RecipeError("method full cannot train the weights of a quantized base", hint="use method lora")
    model = copy.deepcopy(base.model)
    if recipe.method == "full":
        model = model.float()
    if label2id:
        model.config.label2id, model.config.id2label = dict(label2id), {v: k for k, v in label2id.items()}
    if problem:
        model.config.problem_type = PROBLEM_TYPES[problem]
    return dataclasses.replace(base, model=model)


@dataclass(frozen=True)
class _BaseWithVirtualTokens(Base):
    """A base whose context also holds the virtual tokens of an adapter."""

    virtual_tokens: int = 0

    @property
    def max_length(self) -> int:
        return super().max_length - self.virtual_tokens


def _reserve_virtual_tokens(recipe: Recipe, base: Base) -> Base:
    """Return the base with its `max_length` reduced by the virtual tokens of the recipe's adapter."""
    count = recipe.peft.get("num_virtual_tokens", 0)
    if not count:
        return base
    if base.max_length - count < 2:
        context = f"the context of {base.name} is {base.max_length:,} tokens"
        raise RecipeError(f"peft.num_virtual_tokens is {count:,}; {context}")
    return _BaseWithVirtualTokens(**vars(base), virtual_tokens=count)
