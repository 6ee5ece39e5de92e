"""Layers whose adapters were somebody else's before: parameters stay where they are, so there are no slabs.

An optimizer that trains those parameters already keeps moments beside them, element by element in their memory order;
another place or another order would set the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_kit.errors import RoutingError
from lora_kit.layers.conv import LoraConvolution
from lora_kit.layers.embedding import LoraEmbedding
from lora_kit.layers.initialization import MAGNITUDE, A, B
from lora_kit.layers.linear import LoraLinear
from lora_kit.layers.parameter import LoraParameter
from lora_kit.layers.saved_module import SavedModule
from lora_kit.layers.slot_layer import SlotEntry, SlotLayer, leaf_name


class AdoptingLayer(SlotLayer):
    """A layer without slabs: what a slot holds stands alone. What reads slabs by slot is given them stacked anew."""

    def adopt(self, slot: int, tensors: Mapping[str, nn.Parameter], scaling: float, dropout: float) -> None:
        """Have a slot hold these very parameters, trainable where they require grad."""
        self.routing.row_cache.pop(self, None)
        for name, tensor in tensors.items():
            # Not `register_parameter`: that refuses names which a wrapper inside this one has as well.
            self._parameters[leaf_name(name, slot)] = tensor
        self.entries[slot] = SlotEntry(dict(tensors), scaling, dropout)
        self.scaling[slot] = scaling
        self.refresh_trainable()

    def refresh_trainable(self) -> None:
        """See anew which slots train, after `requires_grad` of their parameters was changed."""
        for entry in self.entries:
            if entry is not None:
                entry.trainable = any(tensor.requires_grad for tensor in entry.tensors.values())
        self.trains = any(entry is not None and entry.trainable for entry in self.entries)

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def _place(self, name: str, slot: int, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.device, copy=True)

    def _rebind_entries(self, *, copy: bool) -> None:
        if not copy:  # on another device; room for more slots concerns nobody who stands alone
            super()._rebind_entries(copy=copy)

    def _slab(self, name: str) -> Tensor:
        """Every slot's tensor, padded to the highest rank; differentiable."""
        held = [entry.tensors.get(name) if entry else None for entry in self.entries]
        nothing = super().make_identity_stack(1, self.rank, torch.float32)[name][0]
        return torch.stack([nothing if tensor is None else _pad_to(tensor, nothing) for tensor in held])


class AdoptedLinear(AdoptingLayer, LoraLinear):
    """A linear layer with pairs that stand alone."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entry = None if self.routing.mixed or not self.training else self._uniform()
        if entry is None or not _has_dora_dropout(entry):
            return super().forward(x, *args, **kwargs)
        # y + (c - 1) W drop(x) + c s B A drop(x): PEFT drops the input of the base's share of the change as well.
        y: Tensor = self.base_layer(x, *args, **kwargs)
        dropped = functional.dropout(x, entry.dropout).to(y.dtype)
        pair = dropped @ entry.tensors[A].to(y.dtype).mT @ entry.tensors[B].to(y.dtype).mT
        whole = functional.linear(dropped, self.weight_matrix().to(y.dtype))
        columns = self.compute_dora_scale(entry)
        return (y + (columns - 1) * whole + columns * entry.scaling * pair).to(y.dtype)

    def _by_row(self, y: Tensor, x: Tensor) -> Tensor:
        entries = [self.entries[slot] for slot in self.routing.rows] if self.training else []
        if any(entry is not None and _has_dora_dropout(entry) for entry in entries):
            raise RoutingError(
                "rows of adopted adapters that are DoRA with dropout cannot be trained together",
                hint="use() one adapter at a time",
            )
        return super()._by_row(y, x)

    def _can_gather(self, y: Tensor, x: Tensor) -> bool:
        return False

    def refresh_trainable(self) -> None:
        super().refresh_trainable()
        self._refresh_dora_scales()  # what no longer trains, or was loaded anew, has another length


class AdoptedEmbedding(AdoptingLayer, LoraEmbedding):
    """An embedding with pairs that stand alone."""


class AdoptedModule(AdoptingLayer, SavedModule):
    """A module saved whole, whose copies stand alone."""


class AdoptedParameter(AdoptingLayer, LoraParameter):
    """Fused experts, or another module, with pairs of a parameter."""


class AdoptedConvolution(AdoptingLayer, LoraConvolution):
    """A convolution with pairs."""


def _has_dora_dropout(entry: SlotEntry) -> bool:
    return MAGNITUDE in entry.tensors and entry.dropout > 0


def _pad_to(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor with zeros after its entries along each axis, so that its shape is that of another."""
    missing = [size - have for size, have in zip(like.shape, tensor.shape, strict=True)]
    padding = [number for size in reversed(missing) for number in (0, size)]
    return functional.pad(tensor.to(like.dtype), padding) if any(missing) else tensor.to(like.dtype)
