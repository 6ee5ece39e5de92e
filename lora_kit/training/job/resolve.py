"""A recipe's open values, filled in from its base and its rows: lengths, the separator, the head by name."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from lora_kit.config.lora_config import LoraConfig
from lora_kit.data.preferences import get_answer_format
from lora_kit.data.rows import Rows
from lora_kit.data.sample_format import DEFAULT_MAX_LENGTH
from lora_kit.data.templates import ChatTemplate
from lora_kit.errors import RecipeError, format_list
from lora_kit.io.hub import split_revision
from lora_kit.models.heads import find_head_modules
from lora_kit.models.loading import Base
from lora_kit.models.prompt_tokens import DEFAULT_SEPARATOR
from lora_kit.models.tasks import LABEL_TASKS, SEQ2SEQ, TASK_SPECS
from lora_kit.training.recipe.coerce import Section
from lora_kit.training.recipe.peft_config import can_save_modules
from lora_kit.training.recipe.recipe import HEAD, DataSpec, Recipe

logger = logging.getLogger(__name__)


def resolve_recipe(recipe: Recipe, rows: Rows, base: Base, template: ChatTemplate | None) -> Recipe:
    """Return the recipe with every value that it left open.

    Args:
        rows: of the training file.
        template: of conversations; None for rows of another format.

    Raises:
        RecipeError: a value does not go with the base or the rows.
    """
    recipe = recipe.replace(data=_resolve_data(recipe, rows, base, template))
    if recipe.method == "full":
        return recipe
    if recipe.method == "peft":
        return recipe.replace(peft=_resolve_peft_section(recipe, base))
    return recipe.replace(lora=_resolve_lora_config(recipe, base))


def _resolve_data(recipe: Recipe, rows: Rows, base: Base, template: ChatTemplate | None) -> DataSpec:
    length = recipe.data.max_length or min(base.max_length, DEFAULT_MAX_LENGTH)
    if length > base.max_length:
        raise RecipeError(f"data.max_length is {length}; the context of {base.name} is {base.max_length} tokens")
    separator = recipe.data.separator
    if recipe.task == SEQ2SEQ and separator not in ("", DEFAULT_SEPARATOR):
        raise RecipeError("data.separator is for causal-lm: an encoder reads a prompt as it is", hint="leave it out")
    # Texts have no prompt, so generation must not append a separator; in a chat the template puts one.
    if get_answer_format(rows.format) != "completion" or recipe.task == SEQ2SEQ:
        separator = ""
    text = template.text if template else None
    return dataclasses.replace(recipe.data, max_length=length, separator=separator, chat_template=text)


def _resolve_lora_config(recipe: Recipe, base: Base) -> LoraConfig:
    """Return the adapter's config with its head by name, and with the labels that other tools read."""
    name, revision = split_revision(recipe.lora.base_model_name_or_path or base.name)
    return dataclasses.replace(
        recipe.lora,
        modules_to_save=_resolve_saved_modules(recipe, base, recipe.lora.modules_to_save),
        base_model_name_or_path=name,
        revision=revision or recipe.lora.revision,
        task_type=TASK_SPECS[recipe.task].peft_type,
    )


def _resolve_peft_section(recipe: Recipe, base: Base) -> Section:
    """Return the `peft` section with the head by name."""
    names = recipe.peft.get("modules_to_save") or ()
    saved = _resolve_saved_modules(recipe, base, (names,) if isinstance(names, str) else names)
    if saved and not can_save_modules(recipe.peft):
        kind = recipe.peft["peft_type"]
        raise RecipeError(f"task {recipe.task} trains a head, which {kind} does not save", hint="use another peft_type")
    return {**recipe.peft, "modules_to_save": list(saved)} if saved else recipe.peft


def _resolve_saved_modules(recipe: Recipe, base: Base, names: Sequence[str]) -> tuple[str, ...]:
    """Return `modules_to_save` with the head by name.

    A task with labels always saves its head: it is random at first, so the adapter would be useless without it.
    """
    saved = [name for name in names if name != HEAD]
    if recipe.task in LABEL_TASKS or HEAD in names:
        own = (*find_head_modules(base.model, recipe.task), *base.new_modules)
        head = [name for name in own if name not in saved]
        if head and recipe.method != "features":
            logger.info("the head is in modules_to_save: %s", format_list(head))
        saved += head
    return tuple(saved)
