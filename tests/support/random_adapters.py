"""Random adapters that are strong enough to change what is written."""

from __future__ import annotations

import torch

import lora_kit as lk
from lora_kit.models.loading import Base


def made(base: Base, *, seed: int, separator: str | None = None, **fields: object) -> lk.Adapter:
    """A random adapter strong enough to change what is written."""
    torch.manual_seed(seed)
    config = lk.LoraConfig.from_dict({"r": 4, "lora_alpha": 64, "init_lora_weights": False, **fields})
    bank = lk.attach(base.model, config, name="made")
    try:
        adapter = bank.snapshot("made")
    finally:
        bank.detach()
    record = {"recipe": {"data": {"separator": separator}}} if separator is not None else {}
    return lk.Adapter(adapter.config, adapter.tensors, record=record)
