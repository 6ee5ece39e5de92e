"""Adapter: an immutable value of config and tensors that knows no model, and its folder on disk."""

from lora_kit.adapter.adapter import Adapter

__all__ = ["Adapter"]
