"""Fields of PEFT's config beyond our own: which are unsupported, which are carried, and their values as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value


class UnsupportedField(NamedTuple):
    """A field of PEFT that gives the tensors another meaning.

    Attributes:
        harmless: its values that do not; any other is rejected.
        reason: what it does, for the message.
    """

    harmless: tuple[object, ...]
    reason: str


UNSUPPORTED_FIELDS: Final[Mapping[str, UnsupportedField]] = {
    "use_qalora": UnsupportedField((False, None), "A reads means over groups of its input"),
    "use_bdlora": UnsupportedField((False, None), "A or B is block-diagonal, and only its blocks are stored"),
    "lora_bias": UnsupportedField((False, None), "B has a bias"),
    "bias": UnsupportedField(("none", None), "biases of the base are trained as well"),
    "alora_invocation_tokens": UnsupportedField((None,), "it acts only after certain tokens"),
    "arrow_config": UnsupportedField((None,), "each token chooses among several adapters"),
    "kasa_config": UnsupportedField((None,), "it changes the base's weights, and has a diagonal between A and B"),
    "velora_config": UnsupportedField((None,), "it stores state of its training beside the LoRA weights"),
    "monteclora_config": UnsupportedField((None,), "it stores a sampler beside the LoRA weights"),
    "layer_replication": UnsupportedField((None,), "it repeats layers of the base"),
}
"""By name."""
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
    **{name: field.harmless for name, field in UNSUPPORTED_FIELDS.items() if name not in ("bias", "layer_replication")},
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), (None,)),
    "exclude_modules": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "qalora_group_size": (16,),
    "ensure_weight_tying": (False,),
}
"""Fields that PEFT 0.10 does not know, with the values that say the same as no such field."""
_VERSION_FIELD: Final = "peft_version"
PEFT_TASK_TYPES: Final[Mapping[str, str]] = {
    "causal-lm": "CAUSAL_LM",
    "classify": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "seq2seq": "SEQ_2_SEQ_LM",
}
"""What PEFT calls each task: its `task_type`."""
LABEL_TASK_NAMES: Final = ("classify", "tokens")
"""Tasks whose models predict labels."""
HEADS_SAVED_BY_TASK: Final[Mapping[str, tuple[str, ...]]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""By `task_type`: the heads that PEFT trains and saves though `modules_to_save` does not name them."""

GAUSSIAN: Final = "gaussian"
INITS_OF_PEFT: Final = ("eva", "mica", "orthogonal")
"""Initializations of PEFT that leave the base as it is. Here they are labels: nothing new is trained with them."""
_BASE_CHANGING_INITS: Final = ("corda", "lora_ga", "olora", "pissa")
"""Those that subtract the LoRA weights' initial product from the base: PEFT converts these when they are saved."""


def find_task_name(task_type: str | None) -> str | None:
    """Return the task that PEFT calls `task_type`; None where no task is called so."""
    return next((name for name, known in PEFT_TASK_TYPES.items() if known == task_type), None)


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
    for name, field in UNSUPPORTED_FIELDS.items():
        if name in fields and fields[name] not in field.harmless:
            raise ConfigError(
                f"{name}={format_value(fields[name])} is not supported: {field.reason}",
                hint="load this adapter with PEFT",
            )


def parse_saved_init(init: str) -> str:
    """Return the initialization of an adapter that PEFT saved, where it says nothing about its tensors.

    Raises:
        ConfigError: the tensors need a base that the initialization has changed, or may need one.
    """
    name = init.lower()
    if name == GAUSSIAN or name in INITS_OF_PEFT:
        return name
    if name.startswith(_BASE_CHANGING_INITS):
        raise ConfigError(
            f"init_lora_weights={format_value(init)} starts from a changed base, "
            "so its tensors do not match the original one",
            hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    reason = (
        "replaces the base's weights by quantized ones" if name == "loftq" else "is unknown: it may change the base"
    )
    raise ConfigError(f"init_lora_weights={format_value(init)} {reason}", hint="load this adapter with PEFT")


def to_plain_value(value: object) -> Any:
    """Return a value as JSON has it: tuples and sets become lists, mappings become dicts."""
    if isinstance(value, Mapping):
        return {key: to_plain_value(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [to_plain_value(item) for item in value]
    return value
