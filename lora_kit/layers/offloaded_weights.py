"""Weights that accelerate keeps on the CPU or on disk, and loads for each forward of their module."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn


def offload_device_of(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate loads a module's own weights in each forward; None where it does not.

    Between forwards such weights are on meta: on the CPU or on disk there are copies, under the module's own names.
    """
    hook: Any = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))  # of a SequentialHook, those inside
    devices = (each.execution_device for each in hooks if getattr(each, "offload", False))
    return next((torch.device(device) for device in devices), None)


def read_offloaded(module: nn.Module, name: str) -> Tensor | None:
    """Return the copy, on the CPU or on disk, of a weight that accelerate keeps on meta; None where there is none."""
    hook: Any = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        with contextlib.suppress(KeyError):
            if (weights := getattr(each, "weights_map", None)) is not None:
                copied: Tensor = weights[name]
                return copied
    return None
