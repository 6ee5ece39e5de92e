"""Fields of PEFT's config beyond our own: which are unsupported, which are carried, and their values as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value

UNSUPPORTED_FIELDS: Final[Mapping[str, tuple[object, ...]]] = {
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "layer_replication": (None,),
}
"""Fields of PEFT that change the arithmetic, with the values that do not. Any other value is rejected by name."""
FIXED_FIELDS: Final[Mapping[str, str]] = {"peft_type": "LORA", "bias": "none"}
"""Fields that have one value here."""
FIELDS_NAMING_CODE: Final[Mapping[str, tuple[object, ...]]] = {
    "auto_mapping": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
}
"""Fields of PEFT that name code to import, with the values that name none."""
CARRIED_FIELDS: Final = (
    "peft_version",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
)
"""Fields of PEFT that say how training began or ran, or which version wrote the config. They do not change what the
tensors mean."""

_NEWER_FIELDS: Final[Mapping[str, tuple[object, ...]]] = {
    **{name: values for name, values in UNSUPPORTED_FIELDS.items() if name not in ("bias", "layer_replication")},
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), (None,)),
    "exclude_modules": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "qalora_group_size": (16,),
    "ensure_weight_tying": (False,),
}
"""Fields that PEFT 0.10 does not know, with the values that say the same as no such field."""
_VERSION_FIELD: Final = "peft_version"


def is_dispensable(name: str, value: object) -> bool:
    """Whether a config says the same without this field, which PEFT before the version that brought it rejects."""
    return name == _VERSION_FIELD or value in _NEWER_FIELDS.get(name, ())


def refuse_unsupported(fields: Mapping[str, object]) -> None:
    """Raise ConfigError for a field that changes the arithmetic in a way that is not supported here."""
    if fields.get("enable_lora"):
        raise ConfigError(
            f"enable_lora={format_value(fields['enable_lora'])} is not supported: LoRA weights for parts of a layer, "
            "of PEFT before 0.3",
            hint="`lora-kit convert` makes plain LoRA weights of them",
        )
    for name, harmless in UNSUPPORTED_FIELDS.items():
        if name in fields and fields[name] not in harmless:
            raise ConfigError(
                f"{name}={format_value(fields[name])} is not supported", hint="load this adapter with PEFT"
            )


def refuse_base_changing_init(init: str) -> None:
    """Raise ConfigError for an initialization that changes the base, so that the tensors need a changed base."""
    raise ConfigError(
        f"init_lora_weights={format_value(init)} starts from a changed base, "
        "so its tensors do not match the original one",
        hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
    )


def to_plain_value(value: object) -> Any:
    """Return a value as JSON has it: tuples and sets become lists, mappings become dicts."""
    if isinstance(value, Mapping):
        return {key: to_plain_value(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [to_plain_value(item) for item in value]
    return value
