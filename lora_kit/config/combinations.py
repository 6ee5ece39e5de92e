"""Fields of a config that do not go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_kit.config.peft_fields import to_plain_value
from lora_kit.errors import ConfigError
from lora_kit.io.text import format_value

if TYPE_CHECKING:
    from lora_kit.config.lora_config import LoraConfig


def check_combinations(config: LoraConfig) -> None:
    """Check the fields of a config against each other.

    Raises:
        ConfigError: two of them contradict each other, or the adapter would be empty.
    """
    if config.target_parameters:
        _check_parameters(config)
    for name in ("use_dora", "target_parameters"):
        if config.starts_from_weight and getattr(config, name):
            raise ConfigError(
                f"{name} with init_lora_weights={format_value(config.init_lora_weights)} is not supported",
                hint=f"init_lora_weights: true, or leave {name} out",
            )
    names = (config.target_modules, config.modules_to_save, config.target_parameters, config.trainable_token_indices)
    if not any(names):
        raise ConfigError(
            "target_modules and modules_to_save are both empty: this adapter would hold nothing",
            hint="name layers to adapt, or a head to train with modules_to_save",
        )


def _check_parameters(config: LoraConfig) -> None:
    bare = [name for name in config.target_parameters if "." not in name]
    if bare:
        raise ConfigError(
            f"target_parameters names {format_value(bare[0])} without its module",
            hint="as in experts.gate_up_proj: keys of a weight file name modules, not parameters",
        )
    for name in ("lora_dropout", "use_dora", "rank_pattern", "alpha_pattern"):
        if value := getattr(config, name):
            raise ConfigError(
                f"target_parameters with {name}={format_value(to_plain_value(value))} is not supported",
                hint=f"leave {name} out, or target modules only",
            )
