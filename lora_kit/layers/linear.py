"""Linear layers of every make with LoRA weights beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.initialization import MAGNITUDE, A, B, has_start, in_slabs, pair_of, start_of, trained_of
from lora_kit.layers.introspect import features_of, keeps_transposed
from lora_kit.layers.routing import BASE, Routing
from lora_kit.layers.row_gather import Pair, Part, Room, choices, gathered
from lora_kit.layers.slot_layer import Entry, SlotLayer
from lora_kit.ops import dispatch, torch_kernels
from lora_kit.ops.dora import dora_scale, scale_columns
from lora_kit.ops.lora import is_free, lora_add, lora_add_rows, lora_linear

_KEPT: Final = 4
"""Rows with an adapter, for each slot, whose pairs are kept from one forward to the next."""
_PLAIN: Final = (Tensor, nn.Parameter)
"""Not their subclasses: those compute in ways of their own."""


class _PairLayer(SlotLayer):
    """A layer whose adapters are pairs: `lora_A` (slots, r, in) and `lora_B` (slots, out, r).

    In memory both have the rank before the features: a pair of lower rank is one piece of each slab, and the products
    of a batch read B in the order in which it lies there.
    """

    def neutral(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        size_in, size_out = features_of(self.base_layer)
        return {
            A: torch.zeros(slots, rank, size_in, dtype=dtype, device=self.device),
            B: torch.zeros(slots, rank, size_out, dtype=dtype, device=self.device).mT,
        }

    def _make_neutral(self, slots: Sequence[int]) -> None:
        with torch.no_grad():
            for slot in slots:
                for slab in (*self.slabs.values(), self.scaling):
                    slab[slot].zero_()

    def _routes_by_index(self, x: Tensor) -> bool:
        """Whether slots are read from a tensor.

        Compiled and captured inference always does, so that a swap changes no guard and no graph. On CUDA what is not
        captured does too, where there are kernels for it: a capture may run only what was loaded before.
        """
        if self.routing.mixed:
            return True
        if self.trains and torch.is_grad_enabled():
            return False
        if self.is_recorded():
            return True
        return self.device.type == "cuda" and self.routing.slot != BASE and dispatch.bodies(x) is not torch_kernels

    def _uniform(self) -> Entry | None:
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
        self._room = Room()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._routes_by_index(x):
            return self._by_row(self.base_layer(x, *args, **kwargs), x)
        entry = self._uniform()
        if entry is None:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        dropout = entry.dropout if self.training else 0.0
        if dropout and has_start(entry):
            # Dropped is the input of the pair that is trained, not of what its start takes out of the base.
            y = self._added(x, args, kwargs, *start_of(entry), entry.scaling, 0.0)
            return lora_add(y, x, *trained_of(entry), entry.scaling, dropout=dropout)
        y = self._added(x, args, kwargs, *pair_of(entry), entry.scaling, dropout)
        return scale_columns(y, self._columns_now(entry), self._bias) if MAGNITUDE in entry.tensors else y

    def _added(
        self, x: Tensor, args: Any, kwargs: dict[str, Any], a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        """base(x) + scaling · B A x."""
        plain = None if args or kwargs else self._plain()
        if plain is None:
            return lora_add(self.base_layer(x, *args, **kwargs), x, a, b, scaling, dropout=dropout)
        return lora_linear(x, *plain, a, b, scaling, dropout=dropout)

    def _by_row(self, y: Tensor, x: Tensor) -> Tensor:
        """y = base(x) with each row's update."""
        if not self._can_gather(y, x):
            index = self.routing.index(x)
            y = self._add_slabs(y, x, index)
            return y if self.columns is None else self._scaled_by_row(y, index)
        self.routing.check(x)
        rows = len(self.routing.rows)
        flat = x if x.dtype == y.dtype else x.to(y.dtype)
        flat, into = flat.reshape(rows, -1, x.shape[-1]), y.view(rows, -1, y.shape[-1])
        for part in self._gathered(y.dtype):
            part.add_(into, flat)
        return y if self.columns is None else self._scaled_by_row(y, self.routing.index(x))

    def _add_slabs(self, y: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """y with what the slabs hold for each row."""
        slabs, dropped = (self._slab(A), self._slab(B)), self._dropped_by_row(x)
        if self.trains and any(entry is not None and has_start(entry) for entry in self.entries):
            if dropped is not x:
                nothing = torch.zeros_like(slabs[0]), torch.zeros_like(slabs[1])
                y = lora_add_rows(y, x, *in_slabs(nothing, self.entries, start_of), self.scaling, index)
            slabs = in_slabs(slabs, self.entries, pair_of if dropped is x else trained_of)
        return lora_add_rows(y, dropped, *slabs, self.scaling, index)

    def _can_gather(self, y: Tensor, x: Tensor) -> bool:
        """Whether the rows' pairs may be taken out of the slabs once for many forwards: nothing about them changes."""
        if self.trains or not self.routing.mixed or self.is_recorded() or dispatch.bodies(y) is not torch_kernels:
            return False
        return not (torch.is_grad_enabled() and (y.requires_grad or x.requires_grad)) and is_free(y)

    def _gathered(self, dtype: torch.dtype) -> list[Part]:
        prepared = self.routing.prepared
        kept = prepared.get(self)
        if kept is None or kept[0] != dtype:
            pairs = tuple(self._pair(slot) for slot in self.routing.rows)
            key = self.device, pairs
            if key not in prepared:
                prepared[key] = choices(pairs, self.device)
            # Copies are kept while they take a few times what the slabs do; others are made for each forward.
            keeps = len(pairs) - pairs.count(None) <= _KEPT * len(self.entries)
            room = self._room if keeps else self.routing.room
            kept = dtype, gathered(self.slabs[A], self.slabs[B], prepared[key], dtype, room)
            if keeps:
                prepared[self] = kept
        found: list[Part] = kept[1]
        return found

    def _pair(self, slot: int) -> Pair | None:
        entry = self.entries[slot]
        return None if entry is None else Pair(slot, entry.tensors[A].shape[0], entry.scaling)

    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (out, in) and bias of a base that computes x Wᵀ + bias and nothing else; of others None.

        Quantised, parametrised and hooked layers, and those whose forward was replaced, are black boxes.
        """
        base = self.base_layer
        transposed = type(base) is not nn.Linear
        if transposed and type(base).__name__ != "Conv1D":
            return None
        if base._forward_pre_hooks or base._forward_hooks or base._backward_hooks or base._backward_pre_hooks:
            return None
        weight: Any = base._parameters.get("weight")
        bias: Any = base._parameters.get("bias")
        if "forward" in base.__dict__ or type(weight) not in _PLAIN or weight.requires_grad:
            return None
        return weight.mT if transposed else weight, bias

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

    def _columns_now(self, entry: Entry) -> Tensor:
        """`column_scale` of the entry in use, computed once unless the adapter is trained."""
        if entry.trainable or self.columns is None:
            return self.column_scale(entry)
        return self.columns[self.routing.slot]

    def column_scale(self, entry: Entry) -> Tensor:
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


class LoraExpert(LoraLinear):
    """A linear layer of one expert of a mixture, which is given the tokens that were sent to it, of whatever rows."""

    def _by_row(self, y: Tensor, x: Tensor) -> Tensor:
        if not self.routing.mixed:
            return super()._by_row(y, x)
        if any(self.entries[slot] for slot in self.routing.rows):
            raise RoutingError(
                "an expert does not see which row a token belongs to, so rows of adapters that cover it cannot differ",
                hint="use() one adapter at a time, or adapters that leave the experts alone",
            )
        return y
