"""`attach`: put a bank beside a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_kit.bank.bank import AdapterBank
from lora_kit.bank.frozen_model import check_no_bank, refuse_meta_model
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError, ConfigError
from lora_kit.layers.introspect import unwrap_model
from lora_kit.torch_utils import FLOAT_DTYPES, parse_float_dtype

if TYPE_CHECKING:
    import peft


def attach(
    model: nn.Module,
    config: LoraConfig | peft.LoraConfig | Mapping[str, object] | None = None,
    *,
    name: str = "default",
    slots: int | None = None,
    max_rank: int | None = None,
    dtype: torch.dtype | str | None = None,
    cache_bytes: int = 2**30,
) -> AdapterBank:
    """Put a bank beside a model. Outputs stay bitwise what they were; `bank.detach()` takes everything away again.

    Args:
        model: the base; its parameters are frozen until `detach`. Of one that torch.compile, a trainer
            or an engine put something around, the model inside.
        config: a LoraConfig (or PEFT's) of a trainable adapter, which is added and used.
        name: of that adapter.
        slots: the most adapters that can be loaded at once. A fixed number keeps compiled and captured models valid.
            None: capacity grows when needed.
        max_rank: the largest rank that can be loaded, fixed likewise; None: it grows. (The capacity for token
            embeddings grows when needed.)
        dtype: of the stacked weights: fp32, fp16, bf16 or fp64, also by name. None: fp32 where a config is given, since
            trainable adapters are fp32; else the model's own.
        cache_bytes: host memory for lazy adapters that had to leave their slots; the least recently used one is
            dropped first.

    Raises:
        BankError: the model has a bank already, or is a part or a copy of one that has, or has a part that has; or has
            layers of PEFT, or is on meta.
        TargetError: the config does not match the model, or needs weights that are offloaded; the model is as it was.
        ConfigError: the config, `slots`, `max_rank` or `dtype` is invalid.
        OutOfMemoryError: `slots` of `max_rank` do not fit in memory for even one layer; nothing was allocated.

    Example:
        bank = lk.attach(model, lk.LoraConfig(r=8, lora_alpha=16), name="sql")
        optimizer = torch.optim.AdamW(bank.parameters("sql"), lr=1e-3)
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a model (torch.nn.Module) was expected; {type(model).__name__} was given")
    model = unwrap_model(model)
    _refuse_peft_layers(model)
    check_no_bank(model)
    refuse_meta_model(model)
    if dtype is None:
        stack_dtype = torch.float32 if config is not None else _get_float_dtype(model)
    else:
        stack_dtype = _parse_dtype(dtype)
    bank = AdapterBank(model, slots=slots, max_rank=max_rank, dtype=stack_dtype, cache_bytes=cache_bytes)
    if config is not None:
        try:
            bank.add(name, config)
        except BaseException:
            bank.detach()
            raise
        bank.use(name)
    return bank


def _refuse_peft_layers(model: nn.Module) -> None:
    """Raise BankError for a model with layers of PEFT, whose adapters would count as the base."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # not imported here: where it is not, there is no such layer
    if tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules()):
        raise BankError(
            f"this {type(model).__name__} has layers of PEFT",
            hint="lk.adopt(peft_model) takes them over; attach is for a base without adapters",
        )


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    return torch.float64 if dtype in (torch.float64, "fp64", "float64") else parse_float_dtype(dtype)


def _get_float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that the model computes in: weights of eight bits are not it."""
    dtypes = {torch.float64, *FLOAT_DTYPES.values()}
    return next((p.dtype for p in model.parameters() if p.dtype in dtypes), torch.float32)
