"""Fields of PEFT's config beyond our own: which are refused, which are carried, and values as JSON has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value

# Fields of PEFT that change the arithmetic, with the value that leaves it as it is. Anything else is refused by name.
UNSUPPORTED_FIELDS: Final[Mapping[str, tuple[Any, ...]]] = {
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
FIXED_FIELDS: Final[Mapping[str, str]] = {"peft_type": "LORA", "bias": "none"}
"""Fields that have one value here."""
# Fields of PEFT that name code to import, with the values that name none.
FIELDS_NAMING_CODE: Final[Mapping[str, tuple[Any, ...]]] = {
    "auto_mapping": (None,),
    "megatron_config": (None,),
    "megatron_core": (None, "megatron.core"),
}
# Fields of PEFT that say how training began or ran, or what this version wrote; they do not change what the tensors
# mean.
CARRIED_FIELDS: Final = (
    "peft_version",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
)


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if fields.get("enable_lora"):
        raise ConfigError(
            f"enable_lora={format_value(fields['enable_lora'])} is of PEFT before 0.3: pairs for parts of a layer",
            hint="`lora-kit convert` makes plain pairs of them",
        )
    for name, neutral in UNSUPPORTED_FIELDS.items():
        if name in fields and fields[name] not in neutral:
            raise ConfigError(
                f"{name}={format_value(fields[name])} is not supported", hint="load this adapter with PEFT"
            )


def refuse_base_changing_init(init: str) -> None:
    raise ConfigError(
        f"init_lora_weights={format_value(init)} starts from a changed base, "
        "so its tensors do not fit the original one",
        hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
    )


def to_plain_value(value: Any) -> Any:
    """JSON values: tuples and sets become lists, mappings dicts."""
    if isinstance(value, Mapping):
        return {key: to_plain_value(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [to_plain_value(item) for item in value]
    return value
