"""An adapter whose update is some factor larger: another content, with a digest of its own."""

from __future__ import annotations

from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import ConfigError


def scale_adapter(adapter: Adapter, scale: float) -> Adapter:
    """Return an adapter whose update is `scale` times as large.

    Raises:
        ConfigError: it has more than LoRA weights, which cannot be scaled.
    """
    config = adapter.config
    if config.use_dora or config.modules_to_save or adapter.tokens():
        raise ConfigError("lora_scale is for adapters that have LoRA weights alone")
    tensors = {
        key: tensor * scale if ".lora_B" in key or ".lora_embedding_B" in key else tensor
        for key, tensor in adapter.tensors.items()
    }
    return Adapter(config, tensors, record=adapter.record)
