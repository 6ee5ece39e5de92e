"""What one slot of a layer holds; stacked weights as a function of the leaf parameters that share their memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lora_kit.ops.lora_functions import read_saved

if TYPE_CHECKING:
    from lora_kit.layers.row_gather import RowSlot

CONSTANT_PREFIX: Final = "start of "
"""Prefix of the names of tensors that are never trained."""


@dataclass
class SlotEntry:
    """What one slot of a layer holds: its part of the stacked weights, without padding.

    Attributes:
        tensors: by name; views of the stacked weights. (A magnitude, which few adapters have, is not stacked: it has
            memory of its own.) Those of a trainable slot are leaf parameters.
        scaling: multiplies the low-rank update.
        dropout: probability of dropping an element of the layer's input in training.
        trainable: whether the tensors are trained.
        row_slot: what a row that uses it has; made at its first use, since a forward asks for it in every layer.
    """

    tensors: dict[str, Tensor]
    scaling: float
    dropout: float = 0.0
    trainable: bool = False
    row_slot: RowSlot | None = None

    def list_read_as(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the tensors that a computation in a dtype reads themselves, and not copies of."""
        return [tensor for tensor in self.tensors.values() if tensor.dtype == dtype]


def leaf_name(name: str, slot: int) -> str:
    """Return the name of a leaf parameter among the parameters of its layer."""
    return f"{name.replace('.', '_')}_{slot}"


def stack_leaves(stacked: Tensor, slots: Sequence[int], leaves: Sequence[Tensor]) -> Tensor:
    """Return stacked weights, differentiable with respect to the leaves in their memory.

    Args:
        stacked: (slots, ...).
        slots: of each leaf.
        leaves: each a part of its slot.
    """
    differentiable: Tensor = _StackedFromLeaves.apply(stacked, list(slots), *leaves)
    return differentiable


class _StackingContext(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    slots: list[int]
    shapes: list[torch.Size]


class _StackedFromLeaves(torch.autograd.Function):
    """Stacked weights as a function of the leaves in their memory: no value is copied, gradients are cut out."""

    @staticmethod
    def forward(ctx: _StackingContext, stacked: Tensor, slots: list[int], *leaves: Tensor) -> Tensor:
        ctx.slots, ctx.shapes = slots, [leaf.shape for leaf in leaves]
        # A leaf counts its changes by itself: what is saved of the stacked weights would not show them.
        ctx.save_for_backward(*leaves)
        return stacked.detach()

    @staticmethod
    def backward(ctx: _StackingContext, d_stacked: Tensor) -> tuple[Tensor | None, ...]:
        read_saved(ctx)
        parts = [narrow_to(d_stacked[slot], shape) for slot, shape in zip(ctx.slots, ctx.shapes, strict=True)]
        return None, None, *parts


def narrow_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a view of a tensor's first entries along each axis."""
    if tensor.shape == shape:
        return tensor
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis]:
            tensor = tensor.narrow(axis, 0, size)
    return tensor
