"""Adapters that other tools wrote, in our terms: older PEFT, trainers that save wrapped models, loralib, mlx-lm."""

from lora_kit.foreign.convert import Foreign, convert, read

__all__ = ["Foreign", "convert", "read"]
