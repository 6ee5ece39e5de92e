"""The `peft` section of a recipe: the config of one of PEFT's own types, checked before any work is done.

PEFT takes seconds to import, and only recipes of `method: peft` need it.
"""

from __future__ import annotations

import copy
import typing
from collections.abc import Mapping
from typing import Any, Final

from lora_kit.config.validation import MAX_RANK
from lora_kit.errors import RecipeError, format_list, suggest_nearest
from lora_kit.models.silence import silence_libraries
from lora_kit.models.tasks import CAUSAL_LM, TASK_SPECS
from lora_kit.training.recipe.coerce import coerce_fields, union_members_of

_OWN_LOSS: Final = "its loss has a term of its own, which the loss of a recipe has not"
_ONE_TASK: Final = "it learns several tasks at once, and a recipe has one"
_TRAINED: Final = "it mixes adapters that are trained already"
_MOVES: Final = "it changes the base's weights, and what is saved would not fit the original ones"
_OURS: Final = f"{_MOVES}; method lora has it without that"
_DATA: Final = "it looks at the data before the training, which is not done here"
_UNSAVED: Final = "it keeps a state between steps that a checkpoint would not hold"
UNSUPPORTED_TYPES: Final[Mapping[str, str]] = {
    "ADALORA": f"it takes ranks away between steps; and {_OWN_LOSS}",
    "CPT": _OWN_LOSS,
    "LILY": "its answer to a row depends on the other rows of the batch, and on their padding",
    "MULTITASK_PROMPT_TUNING": _ONE_TASK,
    "POLY": _ONE_TASK,
    "XLORA": _TRAINED,
}
"""Types that a recipe cannot train, and why."""
_UNSUPPORTED_FIELDS: Final[Mapping[str, str]] = {
    "arrow_config": _TRAINED,
    "generator_seed": _UNSAVED,
    "kasa_config": f"{_MOVES}; and {_OWN_LOSS}",
    "monteclora_config": _OWN_LOSS,
    "use_asa": "it takes subspaces away between steps, which is not done here",
    "velora_config": _UNSAVED,
}
"""Fields that must stay as they are by themselves, and why."""
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
    "inference_mode": "it is trained",
    "auto_mapping": "nothing is imported by name",
    "megatron_config": "nothing is imported by name",
    "megatron_core": "nothing is imported by name",
    "tokenizer_kwargs": "nothing is imported by name",
    "runtime_config": "it is not saved",
    "peft_version": "it is the one that is installed",
}
"""Fields that a recipe does not set."""


def parse_peft_section(given: Mapping[str, Any], *, packing: bool, checkpointing: bool) -> dict[str, Any]:
    """The section with its type in capitals and every value of its field's type, as JSON values.

    Args:
        given: `peft_type` and fields of PEFT's config of that type.
        packing, checkpointing: whether the recipe asks for them.

    Raises:
        RecipeError: a type or a field that PEFT does not have or a recipe cannot train, or a value that PEFT refuses.
    """
    fields = dict(given)
    kind = _parse_peft_type(fields.pop("peft_type", None))
    for key in fields:
        if key in _FIXED_FIELDS:
            raise RecipeError(f"peft.{key} cannot be set", hint=_FIXED_FIELDS[key])
    config_class: Any = _load_config_classes()[kind]
    values = coerce_fields(config_class, fields, where="peft.", without=(*_FIXED_FIELDS, "peft_type"))
    if isinstance(values.get("r"), int) and values["r"] > MAX_RANK:
        raise RecipeError(f"peft.r must be at most {MAX_RANK:,}; {values['r']:,} was given")
    section = {"peft_type": kind, **values}
    config = build_peft_config(section, task=CAUSAL_LM)
    _check_trainable(config)
    if config.is_prompt_learning:
        _check_virtual_tokens(section, config, packing=packing, checkpointing=checkpointing)
    if packing and values.get("alora_invocation_tokens"):
        raise RecipeError("peft.alora_invocation_tokens counts from the end of a row, so data.packing must be false")
    return section


def build_peft_config(section: Mapping[str, Any], *, task: str) -> Any:
    """PEFT's config of a checked section.

    Raises:
        RecipeError: values that PEFT refuses together, or a package that it needs and that is missing.
    """
    config_class: Any = _load_config_classes()[section["peft_type"]]
    hints = typing.get_type_hints(config_class)
    # A copy, since PEFT adds to the lists that it is given.
    given = copy.deepcopy(dict(section))
    fields = {key: _build_nested_config(hints[key], value) for key, value in given.items() if key != "peft_type"}
    try:
        with silence_libraries():
            return config_class(task_type=TASK_SPECS[task].peft_type, **fields)
    except (ValueError, TypeError, ImportError, AttributeError, KeyError, RuntimeError) as error:
        raise RecipeError(f"peft: {section['peft_type']}: {' '.join(str(error).split())}") from None


def can_save_modules(section: Mapping[str, Any]) -> bool:
    """Whether adapters of this type can bring modules saved whole."""
    return "modules_to_save" in typing.get_type_hints(_load_config_classes()[section["peft_type"]])


def _load_config_classes() -> dict[str, Any]:
    """PEFT's config classes by the names of their types."""
    with silence_libraries():
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    return {kind.value: found for kind, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _parse_peft_type(given: Any) -> str:
    known = sorted(_load_config_classes())
    if given is None:
        raise RecipeError("peft.peft_type is missing", hint=f"one of {format_list(known, most=len(known))}")
    kind = str(given).upper()
    if kind not in known:
        hint = suggest_nearest(kind, known) or f"known: {format_list(known, most=len(known))}"
        raise RecipeError(f"peft.peft_type {given!r} is not known", hint=hint)
    if kind in UNSUPPORTED_TYPES:
        raise RecipeError(f"peft.peft_type {kind} cannot be trained by a recipe: {UNSUPPORTED_TYPES[kind]}")
    return kind


def _build_nested_config(hint: Any, value: Any) -> Any:
    """Mappings as the dataclasses that the config is made of."""
    classes = [kind for kind in union_members_of(hint) if hasattr(kind, "__dataclass_fields__")]
    return classes[0](**value) if classes and isinstance(value, Mapping) else value


def _check_trainable(config: Any) -> None:
    """Raise RecipeError for what this trainer does not do for PEFT."""
    for key, why in _UNSUPPORTED_FIELDS.items():
        if getattr(config, key, None) not in (None, False):
            raise RecipeError(f"peft.{key} cannot be trained by a recipe: {why}")
    init = str(getattr(config, "init_lora_weights", "")).partition("_niter_")[0]
    if init in _UNSUPPORTED_INITIALIZATIONS:
        raise RecipeError(
            f"peft.init_lora_weights {init!r} cannot be trained by a recipe: {_UNSUPPORTED_INITIALIZATIONS[init]}"
        )
    if getattr(config, "auxiliary_loss_weight", 0):
        raise RecipeError(f"peft: {config.peft_type.value}: {_OWN_LOSS}", hint="peft.auxiliary_loss_weight: 0")


def _check_virtual_tokens(section: Mapping[str, Any], config: Any, *, packing: bool, checkpointing: bool) -> None:
    """What learned tokens before a text do not go together with."""
    kind = section["peft_type"]
    if not isinstance(config.num_virtual_tokens, int) or config.num_virtual_tokens < 1:
        given = config.num_virtual_tokens
        raise RecipeError(f"peft.num_virtual_tokens must be a whole number from 1; {given!r} was given")
    if packing:
        raise RecipeError(f"peft: {kind} puts its tokens before a whole row, so data.packing must be false")
    if checkpointing and kind in ("PREFIX_TUNING", "CARTRIDGE"):
        raise RecipeError(f"peft: {kind} lives in the cache, which is off with gradient checkpointing")
