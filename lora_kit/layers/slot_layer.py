"""SlotLayer: a frozen base layer with slabs beside it, and how adapters come into their slots and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.layers.routing import Routing

CONSTANT_PREFIX: Final = "start of "
"""How the names of tensors begin that are never trained."""


@dataclass
class SlotEntry:
    """What one slot of a layer holds: its part of each slab, without padding.

    Attributes:
        tensors: by name; views of the slabs (a magnitude, which few adapters have, has no slab and stands alone). Those
            of a trainable slot are leaf parameters.
        scaling: multiplies the update of a low-rank pair.
        dropout: probability of dropping an element of the layer's input in training.
    """

    tensors: dict[str, Tensor]
    scaling: float
    dropout: float = 0.0
    trainable: bool = False


class SlotLayer(nn.Module):
    """A frozen base layer and the slabs beside it. Subclasses say what the slabs are and use them in `forward`.

    Everything asked of this module that it does not have is asked of the base layer (T5 reads `wo.weight.dtype`).
    """

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Found at once, where nn.Module would look for it in three dictionaries in every forward.
        self.__dict__["base_layer"] = base_layer
        self.routing = routing
        held = chain(base_layer.parameters(), base_layer.buffers())
        self.device = next((tensor.device for tensor in held), torch.device("cpu"))
        self.dtype = torch.float32
        self.rank = 0
        self.stacked_weights: dict[str, Tensor] = {}
        self.scaling = torch.zeros(0, device=self.device)
        self.entries: list[SlotEntry | None] = []
        self.trains = False
        routing.prepare(self.device)
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base_layer = self.__dict__.get("_modules", {}).get("base_layer")
            if base_layer is None:
                raise
            return getattr(base_layer, name)

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Slabs of this many slots in which every slot leaves the base's output as it is."""
        raise NotImplementedError

    def _place(self, name: str, slot: int, tensor: Tensor) -> Tensor:
        """Where a slot keeps a tensor: the part of the slab that has its shape, or memory of its own without a slab."""
        if name not in self.stacked_weights:
            return tensor.detach().to(self.device, torch.float32, copy=True)
        return _narrow_to(self.stacked_weights[name][slot], tensor.shape)

    def reserve(self, slots: int, rank: int, dtype: torch.dtype) -> None:
        """Make room for this many slots of this rank; what is there stays, and stays the same leaf parameters."""
        has_slots = len(self.entries)
        if slots <= has_slots and rank <= self.rank:
            return
        slots, rank = max(slots, has_slots), max(rank, self.rank)
        slabs = self.make_identity_stack(slots, rank, dtype)
        self.routing.row_cache.pop(self, None)
        self.dtype, self.rank = dtype, rank
        scaling = torch.zeros(slots, device=self.device)
        with torch.no_grad():
            scaling[:has_slots] = self.scaling
            self.stacked_weights, self.scaling = slabs, scaling
            self.entries += [None] * (slots - has_slots)
            self._rebind_entries(copy=True)

    def is_recorded(self) -> bool:
        """Whether this forward is being compiled, or captured into a CUDA graph, to run again under another routing."""
        if torch.compiler.is_compiling():
            return True
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def put(self, slot: int, tensors: Mapping[str, Tensor], scaling: float) -> None:
        """Copy an adapter's tensors into a slot."""
        self.routing.row_cache.pop(self, None)
        places = {name: self._place(name, slot, tensor) for name, tensor in tensors.items()}
        # Entered first: should a copy fail, `clear` finds the slot and makes it neutral again.
        self.entries[slot] = SlotEntry(places, scaling)
        with torch.no_grad():
            for name, tensor in tensors.items():
                places[name].copy_(tensor)
            self.scaling[slot] = scaling

    def make_trainable(self, slot: int, dropout: float) -> list[nn.Parameter]:
        """Turn what a slot holds into leaf parameters that share the slab's memory; returns them."""
        entry = self.entries[slot]
        assert entry is not None
        leaves = []
        for name, view in entry.tensors.items():
            if view.is_floating_point() and not name.startswith(CONSTANT_PREFIX):
                leaf = nn.Parameter(view)
                # Not `register_parameter`: that refuses names which a wrapper inside this one has as well.
                self._parameters[leaf_name(name, slot)] = leaf
                entry.tensors[name] = leaf
                leaves.append(leaf)
        entry.dropout = dropout
        entry.trainable = self.trains = True
        return leaves

    def clear(self, slot: int) -> None:
        """Take an adapter out of a slot: neutral values again, its leaf parameters gone."""
        entry = self.entries[slot]
        if entry is None:
            return
        for name in entry.tensors:
            self._parameters.pop(leaf_name(name, slot), None)
        self.routing.row_cache.pop(self, None)
        self.entries[slot] = None
        if entry.trainable:
            self.trains = any(e is not None and e.trainable for e in self.entries)
        self._reset_slots([slot])

    def refresh_from_base(self) -> None:
        """Bring up to date what was derived from the base's weights."""
        self._reset_slots([slot for slot, entry in enumerate(self.entries) if entry is None])

    def _reset_slots(self, slots: Sequence[int]) -> None:
        with torch.no_grad():
            values = self.make_identity_stack(1, self.rank, self.dtype)
            for slot in slots:
                for name, value in values.items():
                    self.stacked_weights[name][slot].copy_(value[0])
                self.scaling[slot] = 0

    def _rebind_entries(self, *, copy: bool) -> None:
        """Point every entry at the present slabs, first copying its values there if asked."""
        for slot, entry in enumerate(self.entries):
            if entry is None:
                continue
            for name, tensor in entry.tensors.items():
                place = self._place(name, slot, tensor)
                if copy:
                    place.copy_(tensor)
                if isinstance(tensor, nn.Parameter):
                    tensor.data = place
                else:
                    entry.tensors[name] = place

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotLayer:
        """Follow the model to another device. Dtypes stay: fp32 masters survive `model.bfloat16()`."""
        leaves, self._parameters = self._parameters, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters = leaves
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self.device = device
            self.routing.row_cache.pop(self, None)
            self.stacked_weights = {name: slab.to(device) for name, slab in self.stacked_weights.items()}
            self.scaling = self.scaling.to(device)
            self.routing.prepare(device)
            gradients = {id(p): p.grad.to(device) for p in leaves.values() if p is not None and p.grad is not None}
            self._rebind_entries(copy=False)
            for leaf in leaves.values():
                if leaf is not None:
                    leaf.grad = gradients.get(id(leaf))
        return self

    def _slab(self, name: str) -> Tensor:
        """A whole slab, differentiable with respect to the leaf parameters that live in it."""
        slab = self.stacked_weights[name]
        if not (self.trains and torch.is_grad_enabled()):
            return slab
        leaves = [
            (slot, e.tensors[name]) for slot, e in enumerate(self.entries) if e and e.trainable and name in e.tensors
        ]
        return _StackedFromLeaves.apply(slab, [slot for slot, _ in leaves], *[leaf for _, leaf in leaves])


class _StackedFromLeaves(torch.autograd.Function):
    """A slab as a function of the leaves that share its memory: the value is there, their gradients are cut out."""

    @staticmethod
    def forward(ctx: Any, slab: Tensor, slots: list[int], *leaves: Tensor) -> Tensor:
        ctx.slots, ctx.shapes = slots, [leaf.shape for leaf in leaves]
        return slab.detach()

    @staticmethod
    def backward(ctx: Any, d_slab: Tensor) -> tuple[Tensor | None, ...]:
        parts = [_narrow_to(d_slab[slot], shape) for slot, shape in zip(ctx.slots, ctx.shapes, strict=True)]
        return None, None, *parts


def _narrow_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The view of a tensor's first entries along each axis."""
    for axis, size in enumerate(shape):
        tensor = tensor.narrow(axis, 0, size)
    return tensor


def leaf_name(name: str, slot: int) -> str:
    """What a leaf parameter is called among those of its layer."""
    return f"{name.replace('.', '_')}_{slot}"
