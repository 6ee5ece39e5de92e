"""Wrappers around one frozen base layer each. They know slots and routing; names, configs and files are the bank's
affair.

A layer keeps, for everything an adapter may bring to it, a *slab*: one tensor whose first axis is the slot. Slot 0 is
"no adapter" and every slot holds neutral values until an adapter is put there, so any slot may be routed to any layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.ops import (
    dora_scale,
    lora_add,
    lora_add_embedding,
    lora_add_embedding_rows,
    lora_add_rows,
    scale_columns,
)

BASE: Final = 0
"""The slot that means "no adapter"."""
A: Final = "lora_A"
B: Final = "lora_B"
MAGNITUDE: Final = "lora_magnitude_vector"
"""What an adapter brings to a layer, in PEFT's words."""


class Routing:
    """Which slot each row of a batch uses; one object shared by all layers of a bank.

    Attributes:
        mixed: whether rows differ. Compiled code reads this and the index tensors only, so that a swap changes no
            guard.
        slot: the slot of every row; of no meaning while rows differ.
        rows: the slot of each row while they differ, else empty.
    """

    def __init__(self) -> None:
        self.mixed = False
        self.slot = BASE
        self.rows: tuple[int, ...] = ()
        self._uniform: dict[torch.device, Tensor] = {}
        self._by_row: dict[torch.device, Tensor] = {}

    def to_slot(self, slot: int) -> None:
        """Route every row to one slot. Device tensors are written in place, so captured graphs follow."""
        self.mixed, self.slot, self.rows = False, slot, ()
        for tensor in self._uniform.values():
            tensor.fill_(slot)

    def to_rows(self, slots: Sequence[int]) -> None:
        """Route row i of the batch to slots[i]."""
        if len(set(slots)) == 1:
            self.to_slot(slots[0])
            return
        self.mixed, self.slot, self.rows = True, BASE, tuple(slots)
        self._by_row = {device: torch.tensor(self.rows, device=device) for device in self._uniform}

    def prepare(self, device: torch.device) -> None:
        """Make the index tensors of a device before a forward needs them: compiled code may not create them."""
        if device not in self._uniform:
            self._uniform[device] = torch.tensor([self.slot], device=device)

    @property
    def held(self) -> tuple[int, ...]:
        """The slots in use, as `to_rows` takes them back."""
        return self.rows if self.mixed else (self.slot,)

    def index(self, x: Tensor) -> Tensor:
        """Slots as int64 on the device of x: (1,) while all rows use one, else (rows,).

        Raises:
            RoutingError: the batch x (n, ...) cannot be split evenly between the rows.
        """
        if not self.mixed:
            return self._uniform[x.device]
        index = self._by_row[x.device]
        if x.shape[0] % index.shape[0]:
            raise RoutingError(
                f"{index.shape[0]} rows were routed, but a layer was given a batch of {x.shape[0]}",
                hint="name one adapter per row of the batch",
            )
        return index


@dataclass
class _Entry:
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
        self.routing = routing
        self.device = next((p.device for p in base_layer.parameters()), torch.device("cpu"))
        self.dtype = torch.float32
        self.slabs: dict[str, Tensor] = {}
        self.scaling = torch.zeros(0, device=self.device)
        self.entries: list[_Entry | None] = []
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

    def neutral(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Slabs of this many slots in which every slot leaves the base's output as it is."""
        raise NotImplementedError

    def _place(self, name: str, slot: int, tensor: Tensor) -> Tensor:
        """Where a slot keeps a tensor: the part of the slab that has its shape, or memory of its own without a slab."""
        if name not in self.slabs:
            return tensor.detach().to(self.device, torch.float32, copy=True)
        return _corner(self.slabs[name][slot], tensor.shape)

    @property
    def capacity(self) -> tuple[int, int]:
        """(slots, largest rank) there is room for."""
        return len(self.entries), self.slabs[A].shape[1] if A in self.slabs else 0

    def reserve(self, slots: int, rank: int, dtype: torch.dtype) -> None:
        """Make room for this many slots of this rank; what is there stays, and stays the same leaf parameters."""
        has_slots, has_rank = self.capacity
        if slots <= has_slots and rank <= has_rank:
            return
        slots, rank = max(slots, has_slots), max(rank, has_rank)
        slabs = self.neutral(slots, rank, dtype)
        self.dtype = dtype
        scaling = torch.zeros(slots, device=self.device)
        with torch.no_grad():
            scaling[:has_slots] = self.scaling
            self.slabs, self.scaling = slabs, scaling
            self.entries += [None] * (slots - has_slots)
            self._tie(copy=True)

    def put(self, slot: int, tensors: Mapping[str, Tensor], scaling: float) -> None:
        """Copy an adapter's tensors into a slot."""
        entry = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                entry[name] = self._place(name, slot, tensor)
                entry[name].copy_(tensor)
            self.scaling[slot] = scaling
        self.entries[slot] = _Entry(entry, scaling)

    def make_trainable(self, slot: int, dropout: float) -> list[nn.Parameter]:
        """Turn what a slot holds into leaf parameters that share the slab's memory; returns them."""
        entry = self.entries[slot]
        assert entry is not None
        leaves = []
        for name, view in entry.tensors.items():
            if view.is_floating_point():
                leaf = nn.Parameter(view)
                self.register_parameter(_leaf_name(name, slot), leaf)
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
            self._parameters.pop(_leaf_name(name, slot), None)
        self.entries[slot] = None
        self.trains = any(e is not None and e.trainable for e in self.entries)
        self._make_neutral([slot])

    def base_changed(self) -> None:
        """Bring up to date what was derived from the base's weights."""
        self._make_neutral([slot for slot, entry in enumerate(self.entries) if entry is None])

    def _make_neutral(self, slots: Sequence[int]) -> None:
        with torch.no_grad():
            values = self.neutral(1, self.capacity[1], self.dtype)
            for slot in slots:
                for name, value in values.items():
                    self.slabs[name][slot].copy_(value[0])
                self.scaling[slot] = 0

    def _tie(self, *, copy: bool) -> None:
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
            self.slabs = {name: slab.to(device) for name, slab in self.slabs.items()}
            self.scaling = self.scaling.to(device)
            self.routing.prepare(device)
            gradients = {id(p): p.grad.to(device) for p in leaves.values() if p is not None and p.grad is not None}
            self._tie(copy=False)
            for leaf in leaves.values():
                if leaf is not None:
                    leaf.grad = gradients.get(id(leaf))
        return self

    def _slab(self, name: str) -> Tensor:
        """A whole slab, differentiable with respect to the leaf parameters that live in it."""
        slab = self.slabs[name]
        if not (self.trains and torch.is_grad_enabled()):
            return slab
        leaves = [
            (slot, e.tensors[name]) for slot, e in enumerate(self.entries) if e and e.trainable and name in e.tensors
        ]
        return _Tied.apply(slab, [slot for slot, _ in leaves], *[leaf for _, leaf in leaves])


class _Tied(torch.autograd.Function):
    """A slab as a function of the leaves that share its memory: the value is there, their gradients are cut out."""

    @staticmethod
    def forward(ctx: Any, slab: Tensor, slots: list[int], *leaves: Tensor) -> Tensor:
        ctx.slots, ctx.shapes = slots, [leaf.shape for leaf in leaves]
        return slab.detach()

    @staticmethod
    def backward(ctx: Any, d_slab: Tensor) -> tuple[Tensor | None, ...]:
        parts = [_corner(d_slab[slot], shape) for slot, shape in zip(ctx.slots, ctx.shapes, strict=True)]
        return None, None, *parts


class _PairLayer(SlotLayer):
    """A layer whose adapters are pairs: `lora_A` (slots, r, in) and `lora_B` (slots, out, r)."""

    def neutral(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        size_in, size_out = features_of(self.base_layer)
        return {
            A: torch.zeros(slots, rank, size_in, dtype=dtype, device=self.device),
            B: torch.zeros(slots, size_out, rank, dtype=dtype, device=self.device),
        }

    def _routes_by_index(self) -> bool:
        """Whether slots are read from a tensor. Compiled inference always does, so that a swap changes no guard."""
        routing = self.routing
        if torch.compiler.is_compiling():
            return routing.mixed or not (self.trains and torch.is_grad_enabled())
        return routing.mixed

    def _uniform(self) -> _Entry | None:
        """What the one slot of the whole batch holds here."""
        slot = self.routing.slot
        return self.entries[slot] if slot else None

    def weight_matrix(self) -> Tensor:
        """The base weight as (out, in), whatever way round the layer keeps it."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight.mT if keeps_transposed(self.base_layer) else weight


class LoraLinear(_PairLayer):
    """base(x) + scaling · B A x around any layer that maps (..., in) to (..., out), quantised ones included."""

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.columns: Tensor | None = None  # (slots, out) fp32, while an adapter here is a DoRA

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self._routes_by_index():
            index = self.routing.index(x)
            x = self._dropped_by_row(x)
            y = lora_add_rows(y, x, self._slab(A), self._slab(B), self.scaling, index)
            return y if self.columns is None else self._scaled_by_row(y, index)
        entry = self._uniform()
        if entry is None:
            return y
        if entry.dropout and self.training:
            x = nn.functional.dropout(x, entry.dropout)
        y = lora_add(y, x, entry.tensors[A], entry.tensors[B], entry.scaling)
        return scale_columns(y, self.column_scale(entry), self._bias) if MAGNITUDE in entry.tensors else y

    @property
    def _bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def put(self, slot: int, tensors: Mapping[str, Tensor], scaling: float) -> None:
        super().put(slot, tensors, scaling)
        if MAGNITUDE in tensors or self.columns is not None:
            self._refresh_columns()

    def clear(self, slot: int) -> None:
        super().clear(slot)
        if self.columns is not None:
            self._refresh_columns()

    def base_changed(self) -> None:
        super().base_changed()
        self._refresh_columns()

    def reserve(self, slots: int, rank: int, dtype: torch.dtype) -> None:
        super().reserve(slots, rank, dtype)
        if self.columns is not None:
            self._refresh_columns()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotLayer:
        super()._apply(fn, recurse)
        if self.columns is not None:
            self._refresh_columns()
        return self

    def column_scale(self, entry: _Entry) -> Tensor:
        """c = m / |W + s B A| of a DoRA, (out,)."""
        held = entry.tensors
        return dora_scale(self.weight_matrix(), held[A], held[B], entry.scaling, held[MAGNITUDE])

    def _refresh_columns(self) -> None:
        has_dora = any(entry is not None and MAGNITUDE in entry.tensors for entry in self.entries)
        with torch.no_grad():
            self.columns = self._all_columns() if has_dora else None

    def _all_columns(self) -> Tensor:
        """(slots, out): the scale of every slot's DoRA, ones for what is none."""
        ones = torch.ones(features_of(self.base_layer)[1], device=self.device)
        return torch.stack([self.column_scale(e) if e and MAGNITUDE in e.tensors else ones for e in self.entries])

    def _scaled_by_row(self, y: Tensor, index: Tensor) -> Tensor:
        columns = self._all_columns() if self.trains else self.columns
        assert columns is not None
        rows = columns[index].repeat_interleave(y.shape[0] // len(index), 0)
        return scale_columns(y, rows.view(y.shape[0], *[1] * (y.ndim - 2), -1), self._bias)

    def _dropped_by_row(self, x: Tensor) -> Tensor:
        """x (n, ..., in) with each row's own dropout."""
        if not (self.trains and self.training and self.routing.rows):
            return x
        entries = (self.entries[slot] for slot in self.routing.rows)
        keep = torch.tensor([1 - entry.dropout if entry else 1.0 for entry in entries], device=x.device)
        keep = keep.repeat_interleave(x.shape[0] // len(keep)).view(-1, *[1] * (x.ndim - 1))
        return x * (torch.bernoulli(keep.expand(x.shape)) / keep).to(x.dtype)


class LoraEmbedding(_PairLayer):
    """base(ids) + scaling · Aᵀ[ids] Bᵀ: the same update where the layer looks rows up."""

    def forward(self, ids: Tensor) -> Tensor:
        y = self.base_layer(ids)
        # Gemma and BART multiply what they look up; the update is of the table, so it is multiplied too.
        scale = float(getattr(self.base_layer, "embed_scale", 1.0))
        if self._routes_by_index():
            a, b = self._slab(A), self._slab(B)
            return lora_add_embedding_rows(y, ids, a, b, self.scaling * scale, self.routing.index(ids))
        entry = self._uniform()
        if entry is None:
            return y
        return lora_add_embedding(y, ids, entry.tensors[A], entry.tensors[B], entry.scaling * scale)


class SavedModule(SlotLayer):
    """A module that adapters replace as a whole (`modules_to_save`): a slab for each of its parameters and buffers.

    Trained in fp32; computed in the base module's dtype. Rows that use different copies are computed copy by copy: the
    module is a black box, and a head is a small part of a model.
    """

    def neutral(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        def repeated(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(self.device, kind).unsqueeze(0).repeat(slots, *[1] * tensor.ndim)

        return {name: repeated(tensor) for name, tensor in self.base_layer.state_dict().items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        routing = self.routing
        if routing.mixed:
            return self._call_rows(routing.rows, args, kwargs)
        if torch.compiler.is_compiling() and not self.trains:
            slot = routing.index(self.scaling)
            return self._call({name: slab.index_select(0, slot)[0] for name, slab in self.slabs.items()}, args, kwargs)
        return self._call_slot(routing.slot, args, kwargs)

    def _call_slot(self, slot: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = self.entries[slot]
        if entry is None:
            return self.base_layer(*args, **kwargs)
        return self._call(entry.tensors, args, kwargs)

    def _call(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = self.base_layer.state_dict(keep_vars=True)
        cast = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
        return torch.func.functional_call(self.base_layer, cast, args, kwargs)

    def _call_rows(self, rows: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise RoutingError("a saved module that takes more than one tensor cannot serve rows of different adapters")
        x = args[0]
        self.routing.index(x)  # checks the batch
        held = [slot if self.entries[slot] else BASE for slot in rows]
        owner = torch.tensor(held).repeat_interleave(x.shape[0] // len(rows))
        order, parts = [], []
        for slot in sorted(set(held)):
            mine = (owner == slot).nonzero().squeeze(1).to(x.device)
            order.append(mine)
            parts.append(self._call_slot(slot, (x.index_select(0, mine),), {}))
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())


def _corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The view of a tensor's first entries along each axis."""
    for axis, size in enumerate(shape):
        tensor = tensor.narrow(axis, 0, size)
    return tensor


def _leaf_name(name: str, slot: int) -> str:
    return f"{name.replace('.', '_')}_{slot}"


def kind_of(module: nn.Module) -> str | None:
    """`linear`, `embedding`, or None for a module that cannot carry a low-rank pair."""
    if isinstance(module, SlotLayer):
        module = module.base_layer
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    return None


def keeps_transposed(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as (in, out): transformers' Conv1D, and the table of an embedding."""
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


def features_of(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a layer that carries pairs; for an embedding (entries, dim)."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if type(module).__name__ == "Conv1D":  # transformers' Conv1D keeps its weight as (in, out)
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def initialise(a: Tensor, b: Tensor, *, kind: str, init: bool | str) -> None:
    """Fill a fresh pair in place, as PEFT does: `B A` is zero unless `init` is False.

    Args:
        a: (r, in), Kaiming-uniform, or normal with deviation 1/r for `"gaussian"`. b: (out, r), zero.
        kind: for an embedding A is zero and B normal.
        init: `LoraConfig.init_lora_weights`.
    """
    with torch.no_grad():
        if kind == "embedding":
            a.zero_() if init else a.normal_()
            b.normal_()
        else:
            if init == "gaussian":
                a.normal_(std=1 / a.shape[0])
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            b.zero_() if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))


def wrap(module: nn.Module, routing: Routing) -> SlotLayer:
    """The wrapper for a layer that carries pairs."""
    return LoraEmbedding(module, routing) if kind_of(module) == "embedding" else LoraLinear(module, routing)
