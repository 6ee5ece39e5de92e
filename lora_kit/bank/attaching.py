"""attach: a bank put beside a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_kit.bank.bank import AdapterBank
from lora_kit.errors import BankError
from lora_kit.layers import SlotLayer


def attach(
    model: nn.Module,
    config: Any = None,
    *,
    name: str = "default",
    slots: int | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
    cache_bytes: int = 2**30,
) -> AdapterBank:
    """Put a bank beside a model. Outputs stay bitwise what they were; `bank.detach()` takes everything away again.

    Args:
        model: the base; its parameters are frozen until `detach`.
        config: a LoraConfig (or PEFT's) to start a trainable adapter with, which becomes the active one.
        name: of that adapter.
        slots: adapters there is room for. The room is fixed, so that compiled and captured models stay valid. None: it
            grows when it must.
        max_rank: the largest rank there is room for, fixed likewise; None: it grows. (Room for rows of new tokens grows
            when it must.)
        dtype: of the slabs. fp32 where a config is given, since trainable adapters are fp32; else the model's own.
        cache_bytes: host memory for offered adapters that had to leave their slots, the least recently used ones first
            to go.

    Raises:
        BankError: the model has a bank already.
        TargetError: the config does not fit the model; the model is as it was.
        ConfigError: the config, `slots` or `max_rank` is none.

    Example:
        bank = lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16), name="sql")
        optimizer = torch.optim.AdamW(bank.parameters("sql"), lr=1e-3)
    """
    if any(isinstance(module, SlotLayer) for module in model.modules()) or "_lora_kit_bank" in model.__dict__:
        raise BankError("this model has a bank already", hint="add adapters to that one, or detach it first")
    if config is not None:
        dtype = dtype or torch.float32
    dtype = dtype or _dtype_of(model)
    bank = AdapterBank(model, slots=slots, max_rank=max_rank, dtype=dtype, cache_bytes=cache_bytes)
    if config is not None:
        try:
            bank.add(name, config)
        except BaseException:
            bank.detach()
            raise
        bank.use(name)
    return bank


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
