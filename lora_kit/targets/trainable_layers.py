"""Which layers can have the LoRA weights that a config asks for."""

from __future__ import annotations

from torch import nn

from lora_kit.config.lora_config import LoraConfig
from lora_kit.layers.grouped_linear import is_grouped_linear
from lora_kit.layers.introspect import is_unquantized, kind_of, maps_features


def reason_not_trainable(module: nn.Module, config: LoraConfig) -> str | None:
    """Return why a module cannot have the LoRA weights that a config asks for; None where it can."""
    kind = kind_of(module)
    if kind is None:
        return f"a {type(module).__name__} is not a linear layer or an embedding"
    if is_grouped_linear(module):
        is_plain = not config.use_dora and not config.starts_from_weight
        return None if is_plain else "DoRA and initializations from the weight are not for layers in groups"
    if isinstance(module, nn.Linear) and not maps_features(module):
        return f"a {type(module).__name__} does not map (..., in_features) to (..., out_features)"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and _is_unsupported_convolution(module):
        return "a convolution with groups, dilation or a padding mode other than zeros"
    if config.use_dora and (kind != "linear" or not _has_float_weight(module)):
        return "DoRA needs a linear layer whose weight is not quantized"
    if config.starts_from_weight and kind != "linear":
        return f"init_lora_weights={config.init_lora_weights} is for linear layers"
    return None


def _is_unsupported_convolution(module: nn.Conv1d | nn.Conv2d) -> bool:
    return module.groups > 1 or set(module.dilation) != {1} or module.padding_mode != "zeros"


def _has_float_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and is_unquantized(weight)
