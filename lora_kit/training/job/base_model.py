"""The base of a training: loaded, or given; a copy where the training would change it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from lora_kit.errors import RecipeError
from lora_kit.models.loading import Base, load_base
from lora_kit.training.recipe.recipe import METHODS_CHANGING_BASE, Recipe


def prepare_base(recipe: Recipe, given: Base | None, label2id: Mapping[str, int]) -> Base:
    """The base that a recipe trains on.

    Args:
        given: a base that is loaded already; None to load the recipe's.
        label2id: the labels, where the task has some.

    Raises:
        RecipeError: the base given is another, or not for this recipe.
        BaseModelError: the recipe's cannot be loaded.
    """
    base = _load_recipe_base(recipe, label2id) if given is None else _reuse_loaded_base(recipe, given, label2id)
    return _reserve_virtual_tokens(recipe, base)


def _load_recipe_base(recipe: Recipe, label2id: Mapping[str, int]) -> Base:
    # Small steps are lost in 16 bits: every weight is trained in fp32 unless the recipe asks for something else.
    dtype = "fp32" if recipe.method == "full" and recipe.dtype == "auto" else recipe.dtype
    return load_base(recipe.base, task=recipe.task, label2id=label2id or None, dtype=dtype, quantize=recipe.quantize)


def _reuse_loaded_base(recipe: Recipe, base: Base, label2id: Mapping[str, int]) -> Base:
    """A base that someone else loaded, checked against the recipe; a copy of it where its weights will change."""
    if (base.name, base.task) != (recipe.base, recipe.task):
        given = f"the base given is {base.name} ({base.task})"
        raise RecipeError(f"the recipe is for {recipe.base} ({recipe.task}), {given}")
    if recipe.dtype != "auto" or recipe.quantize:
        raise RecipeError("dtype and quantize do nothing for a base that is loaded already", hint="load it so")
    if label2id and base.model.config.num_labels != len(label2id):
        raise RecipeError(f"the base given has {base.model.config.num_labels} labels, the data {len(label2id)}")
    if recipe.method not in METHODS_CHANGING_BASE:
        return base
    if recipe.method == "full" and getattr(base.model, "is_quantized", False):
        raise RecipeError("method full cannot train the weights of a quantised base", hint="use method lora")
    model = copy.deepcopy(base.model)
    if recipe.method == "full":
        model = model.float()
    if label2id:
        model.config.label2id, model.config.id2label = dict(label2id), {v: k for k, v in label2id.items()}
    return dataclasses.replace(base, model=model)


@dataclass(frozen=True)
class _BaseWithVirtualTokens(Base):
    """A base that sees `taken` tokens of an adapter before every text."""

    taken: int = 0

    @property
    def max_length(self) -> int:
        return super().max_length - self.taken


def _reserve_virtual_tokens(recipe: Recipe, base: Base) -> Base:
    taken = recipe.peft.get("num_virtual_tokens", 0)
    if not taken:
        return base
    if base.max_length - taken < 2:
        raise RecipeError(f"peft.num_virtual_tokens is {taken:,}; {base.name} sees {base.max_length:,} tokens at once")
    return _BaseWithVirtualTokens(**vars(base), taken=taken)
