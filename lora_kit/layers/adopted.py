"""Layers whose adapters were somebody else's before: parameters stay where they are, so there are no slabs.

An optimizer that trains those parameters already keeps moments beside them, element by element in their memory order;
another place or another order would set the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.layers.pairs import LoraEmbedding, LoraLinear
from lora_kit.layers.saved import SavedModule
from lora_kit.layers.slots import Entry, SlotLayer, leaf_name


class AdoptingLayer(SlotLayer):
    """A layer without slabs: what a slot holds stands alone. What reads slabs by slot is given them stacked anew."""

    def adopt(self, slot: int, tensors: Mapping[str, nn.Parameter], scaling: float, dropout: float) -> None:
        """Have a slot hold these very parameters, trainable where they require grad."""
        self.routing.prepared.pop(self, None)
        for name, tensor in tensors.items():
            self.register_parameter(leaf_name(name, slot), tensor)
        self.entries[slot] = Entry(dict(tensors), scaling, dropout)
        self.scaling[slot] = scaling
        self.note_trainable()

    def note_trainable(self) -> None:
        """See anew which slots train, after `requires_grad` of their parameters was changed."""
        for entry in self.entries:
            if entry is not None:
                entry.trainable = any(tensor.requires_grad for tensor in entry.tensors.values())
        self.trains = any(entry is not None and entry.trainable for entry in self.entries)

    def neutral(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def _place(self, name: str, slot: int, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, copy=True)

    def _tie(self, *, copy: bool) -> None:
        if not copy:  # on another device; room for more slots concerns nobody who stands alone
            super()._tie(copy=copy)

    def _slab(self, name: str) -> Tensor:
        """Every slot's tensor, padded to the highest rank; differentiable."""
        held = [entry.tensors.get(name) if entry else None for entry in self.entries]
        nothing = super().neutral(1, self.rank, torch.float32)[name][0]
        return torch.stack([nothing if tensor is None else _padded(tensor, nothing) for tensor in held])


class AdoptedLinear(AdoptingLayer, LoraLinear):
    """A linear layer with pairs that stand alone."""

    def _can_gather(self, y: Tensor, x: Tensor) -> bool:
        return False

    def adopt(self, slot: int, tensors: Mapping[str, nn.Parameter], scaling: float, dropout: float) -> None:
        super().adopt(slot, tensors, scaling, dropout)
        self._refresh_columns()


class AdoptedEmbedding(AdoptingLayer, LoraEmbedding):
    """An embedding with pairs that stand alone."""


class AdoptedModule(AdoptingLayer, SavedModule):
    """A module saved whole, whose copies stand alone."""


def _padded(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with zeros after its entries along each axis, so that its shape is that of another."""
    missing = [size - have for size, have in zip(like.shape, tensor.shape, strict=True)]
    padding = [number for size in reversed(missing) for number in (0, size)]
    return functional.pad(tensor.to(like.dtype), padding) if any(missing) else tensor.to(like.dtype)
