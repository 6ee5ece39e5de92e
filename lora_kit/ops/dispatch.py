"""Which kernels compute the products of a low-rank update: Triton's on CUDA, plain torch everywhere else."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Final, Protocol

import torch
from torch import Tensor

from lora_kit.errors import ConfigError
from lora_kit.ops import torch_kernels

KERNELS_VARIABLE: Final = "LORA_KIT_KERNELS"
"""Environment variable: `plain` or `triton` selects those kernels for everything; unavailable ones are an error."""

_TRITON_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


class Kernels(Protocol):
    """The products, as `torch_kernels` documents them."""

    def add_(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor: ...
    def add_rows_(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor: ...
    def shrink_rows(self, x: Tensor, a: Tensor, slots: Tensor) -> Tensor: ...
    def expand_rows_(self, y: Tensor, h: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> None: ...


_kernels_cache: dict[tuple[torch.device, torch.dtype], Kernels] = {}


def get_kernels(x: Tensor) -> Kernels:
    """Return the kernels for products in the dtype of x, on its device. Chosen once for each, then looked up.

    Raises:
        ConfigError: LORA_KIT_KERNELS names kernels that do not exist, or are unavailable here.
    """
    key = x.device, x.dtype
    if key not in _kernels_cache:
        _kernels_cache[key] = choose_kernels(*key)
    return _kernels_cache[key]


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return `triton_kernels` where they are available, else `torch_kernels`.

    Raises:
        ConfigError: as in `get_kernels`.
    """
    forced = os.environ.get(KERNELS_VARIABLE, "")
    if forced not in ("", "plain", "triton"):
        raise ConfigError(f"{KERNELS_VARIABLE}={forced} names no kernels", hint="plain or triton, or leave it unset")
    if forced == "plain" or (not forced and device.type != "cuda"):
        return torch_kernels
    reason = _reason_not_triton(device, dtype)
    if reason is not None and forced:
        raise ConfigError(
            f"{KERNELS_VARIABLE}=triton, but {reason}", hint=f"unset {KERNELS_VARIABLE}, or set it to plain"
        )
    if reason is not None:
        return torch_kernels
    from lora_kit.ops import triton_kernels

    return triton_kernels


def _reason_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why Triton's kernels are unavailable; None where they are available."""
    if dtype not in _TRITON_DTYPES:
        return f"its kernels do not compute in {dtype}"
    # Triton's interpreter runs the same kernels on the CPU, slowly: that is for tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, not on a CUDA device"
    if find_spec("triton") is None:
        return "triton is not installed"
    return None
