"""The `peft` section of a recipe: the config of one of PEFT's own types, checked before any work is done.

PEFT takes seconds to import, and only recipes of `method: peft` need it.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from lora_kit.config.validation import MAX_RANK
from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.io.text import format_value, shorten
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CAUSAL_LM, TASK_SPECS
from lora_kit.training.recipe.coerce import Section, coerce_fields, union_members_of

if TYPE_CHECKING:
    from peft import PeftConfig

_OWN_LOSS: Final = "its loss has an additional term, which is not computed here"
_ONE_TASK: Final = "it learns several tasks at once; a recipe has one"
_TRAINED: Final = "it mixes adapters that are already trained"
_MOVES: Final = "it changes the base's weights, so the saved adapter would not fit the original ones"
_OURS: Final = f"{_MOVES}; method lora does it without changing them"
_DATA: Final = "it needs a pass over the data before training, which is not done here"
_UNSAVED: Final = "it keeps state between steps that a checkpoint does not save"
UNSUPPORTED_TYPES: Final[Mapping[str, str]] = {
    "ADALORA": f"it removes ranks between steps; and {_OWN_LOSS}",
    "CPT": _OWN_LOSS,
    "LILY": "its output for a row depends on the other rows of the batch and on their padding",
    "MULTITASK_PROMPT_TUNING": _ONE_TASK,
    "POLY": _ONE_TASK,
    "XLORA": _TRAINED,
}
"""Adapter types of PEFT that a recipe cannot train, and why."""
_UNSUPPORTED_FIELDS: Final[Mapping[str, str]] = {
    "arrow_config": _TRAINED,
    "generator_seed": _UNSAVED,
    "kasa_config": f"{_MOVES}; and {_OWN_LOSS}",
    "monteclora_config": _OWN_LOSS,
    "use_asa": "it removes subspaces between steps, which is not done here",
    "velora_config": _UNSAVED,
}
"""Fields that must keep their default, and why."""
_UNSUPPORTED_INITIALIZATIONS: Final[Mapping[str, str]] = {
    "corda": _DATA,
    "eva": _DATA,
    "lora_ga": _DATA,
    "loftq": _MOVES,
    "olora": _OURS,
    "pissa": _OURS,
}
_FIXED_FIELDS: Final[Mapping[str, str]] = {
    "task_type": "the recipe's task decides it",
    "base_model_name_or_path": "it is the recipe's base",
    "revision": "it is the recipe's base",
    "inference_mode": "the adapter is trained",
    "auto_mapping": "nothing is imported by name",
    "megatron_config": "nothing is imported by name",
    "megatron_core": "nothing is imported by name",
    "tokenizer_kwargs": "nothing is imported by name",
    "runtime_config": "it is not saved",
    "peft_version": "it is the installed version",
}
"""Fields that a recipe cannot set, and why."""


def parse_peft_section(section: Section, *, packing: bool, checkpointing: bool) -> dict[str, object]:
    """Return the section with its type in capitals and every value converted to its field's type, as JSON values.

    Args:
        section: `peft_type` and fields of PEFT's config of that type.
        packing, checkpointing: whether the recipe sets `data.packing` and gradient checkpointing.

    Raises:
        RecipeError: a type or a field that PEFT does not have or a recipe cannot train, or a value that PEFT rejects.
    """
    fields = dict(section)
    kind = _parse_peft_type(fields.pop("peft_type", None))
    for key in fields:
        if key in _FIXED_FIELDS:
            raise RecipeError(f"peft.{key} cannot be set", hint=_FIXED_FIELDS[key])
    values = coerce_fields(_load_config_classes()[kind], fields, where="peft.", without=(*_FIXED_FIELDS, "peft_type"))
    if isinstance(values.get("r"), int) and values["r"] > MAX_RANK:
        raise RecipeError(f"peft.r must be at most {MAX_RANK:,}; {values['r']:,} was given")
    parsed = {"peft_type": kind, **values}
    config = build_peft_config(parsed, task=CAUSAL_LM)
    _check_trainable(kind, config)
    if config.is_prompt_learning:
        _check_virtual_tokens(kind, config, packing=packing, checkpointing=checkpointing)
    if packing and values.get("alora_invocation_tokens"):
        raise RecipeError("peft.alora_invocation_tokens counts from the end of a row, so data.packing must be false")
    return parsed


def build_peft_config(section: Section, *, task: str) -> PeftConfig:
    """Return PEFT's config for a checked section.

    Raises:
        RecipeError: PEFT rejects these values together, or a package that it needs is missing.
    """
    config_class = _load_config_classes()[section["peft_type"]]
    hints = typing.get_type_hints(config_class)
    # A copy, since PEFT appends to the lists it is given.
    values = copy.deepcopy(dict(section))
    del values["peft_type"]
    fields = {key: _build_nested_config(hints[key], value) for key, value in values.items()}
    try:
        with silence_libraries():
            return config_class(task_type=TASK_SPECS[task].peft_type, **fields)
    except (ValueError, TypeError, ImportError, AttributeError, KeyError, RuntimeError) as error:
        raise RecipeError(f"peft: {section['peft_type']}: {shorten(error)}") from None


def can_save_modules(section: Section) -> bool:
    """Return whether adapters of this type have `modules_to_save`."""
    return "modules_to_save" in typing.get_type_hints(_load_config_classes()[section["peft_type"]])


def _load_config_classes() -> dict[str, type[PeftConfig]]:
    """Return PEFT's config classes by the names of their types."""
    with silence_libraries():
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    return {kind.value: config_class for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _parse_peft_type(value: object) -> str:
    known = sorted(_load_config_classes())
    if value is None:
        raise RecipeError("peft.peft_type is missing", hint=f"one of {format_list(known, most=len(known))}")
    kind = str(value).upper()
    if kind not in known:
        hint = suggest_nearest(kind, known) or f"known: {format_list(known, most=len(known))}"
        raise RecipeError(f"peft.peft_type {format_value(value)} is not known", hint=hint)
    if kind in UNSUPPORTED_TYPES:
        raise RecipeError(f"peft.peft_type {kind} cannot be trained by a recipe: {UNSUPPORTED_TYPES[kind]}")
    return kind


def _build_nested_config(hint: object, value: object) -> Any:
    """Return a mapping as the dataclass that its field's type names; any other value as it is."""
    classes = [kind for kind in union_members_of(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return classes[0](**value) if classes and isinstance(value, Mapping) else value


def _check_trainable(kind: str, config: PeftConfig) -> None:
    """Raise RecipeError for a config that needs more than the training loop here does."""
    for key, why in _UNSUPPORTED_FIELDS.items():
        if getattr(config, key, None) not in (None, False):
            raise RecipeError(f"peft.{key} cannot be trained by a recipe: {why}")
    init = str(getattr(config, "init_lora_weights", "")).partition("_niter_")[0]
    if init in _UNSUPPORTED_INITIALIZATIONS:
        raise RecipeError(
            f"peft.init_lora_weights {format_value(init)} cannot be trained by a recipe: "
            f"{_UNSUPPORTED_INITIALIZATIONS[init]}"
        )
    if getattr(config, "auxiliary_loss_weight", 0):
        raise RecipeError(f"peft: {kind}: {_OWN_LOSS}", hint="peft.auxiliary_loss_weight: 0")


def _check_virtual_tokens(kind: str, config: PeftConfig, *, packing: bool, checkpointing: bool) -> None:
    """Raise RecipeError for settings that do not work with virtual tokens before a text."""
    count = getattr(config, "num_virtual_tokens", None)
    if not isinstance(count, int) or count < 1:
        raise RecipeError(f"peft.num_virtual_tokens must be a whole number from 1; {format_value(count)} was given")
    if packing:
        raise RecipeError(f"peft: {kind} puts its virtual tokens before a whole row, so data.packing must be false")
    if checkpointing and kind in ("PREFIX_TUNING", "CARTRIDGE"):
        raise RecipeError(f"peft: {kind} needs the key-value cache, which is off with gradient checkpointing")
