"""The config of an adapter, in PEFT's words. No torch here: reading a config allocates nothing."""

from lora_kit.config.lora_config import LoraConfig

__all__ = ["LoraConfig"]
