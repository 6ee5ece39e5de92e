"""The dtypes that people may ask for, by the names they use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch

from lora_kit.errors import ConfigError, listed, nearest

FLOATS: Final[Mapping[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def float_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """One of `FLOATS`, by name or as it is.

    Raises:
        ConfigError: it is none of them.
    """
    if isinstance(dtype, torch.dtype) and dtype in FLOATS.values():
        return dtype
    if not isinstance(dtype, str) or dtype not in FLOATS:
        hint = nearest(str(dtype), FLOATS) or listed(list(FLOATS))
        raise ConfigError(f"dtype {dtype!r} is not known", hint=hint)
    return FLOATS[dtype]
