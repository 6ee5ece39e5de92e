"""A base that runs out of memory within a training step, and what a training has in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lora_kit.models.loading import Base
from lora_kit.training.plan.live_bytes import LiveBytes
from lora_kit.training.train import train
from tests.support.training import base_of


def device_is_full(*_: Any) -> None:
    """Raise what torch raises when a device has no memory left."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Narrow:
    """A base whose last layer finds no memory for the backward of more than so many rows, after so many calls."""

    def __init__(self, base: Base, rows: int, fail: Callable[..., None] = device_is_full, *, calls: int = 0) -> None:
        self.rows, self.fail, self.calls = rows, fail, calls
        self.seen: list[int] = []
        layer = base.model.model.layers[1] if hasattr(base.model, "model") else base.model.transformer.h[1]
        layer.register_forward_pre_hook(self.forwards)
        layer.register_full_backward_hook(self.backwards)

    def forwards(self, module: torch.nn.Module, given: Any) -> None:
        if module.training:
            self.seen.append(len(given[0]))

    def backwards(self, *_: Any) -> None:
        # The gradients of the layers above are there by now, and those of the micro-batches before.
        if self.seen and self.seen[-1] > self.rows and len(self.seen) > self.calls:
            self.fail()


def narrow(kind: str, rows: int, fail: Callable[..., None] = device_is_full, *, calls: int = 0) -> Callable[[], Base]:
    """Return what makes bases whose backward fails with more than `rows` rows."""

    def made() -> Base:
        base = base_of(kind)
        Narrow(base, rows, fail, calls=calls)
        return base

    return made


def count_training(recipe: dict[str, Any], base: Base) -> int:
    """Return the most bytes that are alive at once while a recipe is trained."""
    live = LiveBytes()
    for tensor in (*base.model.parameters(), *base.model.buffers()):
        live.add(tensor)
    with live:
        train(recipe, base=base)
    return live.peak
