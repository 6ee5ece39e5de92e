"""Adapter: an immutable value of config and tensors that knows no model, and the folder it is on disk."""

from lora_kit.adapter.adapter import Adapter

__all__ = ["Adapter"]
