"""Layers without stacked weights: each slot has memory of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_kit.layers.slot_layer import SlotLayer


class UnstackedLayer(SlotLayer):
    """A layer of which every slot has memory of its own, of any shape."""

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def _get_memory(self, stacked: Mapping[str, Tensor], name: str, slot: int, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, self.dtype, copy=True)

    def _rebind_entries(self, stacked: Mapping[str, Tensor], *, copy: bool) -> None:
        if not copy:  # on another device; where only slots are added, every tensor stays in its memory
            super()._rebind_entries(stacked, copy=copy)


class UpdatedWeightLayer(UnstackedLayer):
    """A layer that adds its update to one weight of the base. Subclasses define both."""

    @property
    def base_weight(self) -> nn.Parameter:
        """The base weight that is updated."""
        raise NotImplementedError
