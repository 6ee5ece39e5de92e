"""Linear layers of every make with LoRA weights beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.initialization import (
    MAGNITUDE,
    A,
    B,
    has_initialization,
    lora_weights_of,
    negated_initialization_of,
    replace_initialized_slots,
    trained_weights_of,
)
from lora_kit.layers.introspect import features_of, is_stored_transposed
from lora_kit.layers.routing import BASE_SLOT, Routing
from lora_kit.layers.row_gather import GatherBuffer, RowGroup, RowSlot, gather_row_groups, select_row_groups
from lora_kit.layers.slot_layer import SlotEntry, SlotLayer
from lora_kit.ops import dispatch, torch_kernels
from lora_kit.ops.dora import dora_scale, scale_columns
from lora_kit.ops.lora import can_overwrite, lora_add, lora_add_rows, lora_linear

_CACHED_ROWS_PER_SLOT: Final = 4
"""Rows with an adapter, for each slot, whose pairs are kept from one forward to the next."""
_PLAIN_TYPES: Final = (Tensor, nn.Parameter)
"""Not their subclasses: those compute in ways of their own."""


class _LoraLayer(SlotLayer):
    """A layer whose adapters are pairs: `lora_A` (slots, r, in) and `lora_B` (slots, out, r).

    In memory both have the rank before the features: a pair of lower rank is one piece of each slab, and the products
    of a batch read B in the order in which it lies there.
    """

    def make_identity_stack(self, slots: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        size_in, size_out = features_of(self.base_layer)
        return {
            A: torch.zeros(slots, rank, size_in, dtype=dtype, device=self.device),
            B: torch.zeros(slots, rank, size_out, dtype=dtype, device=self.device).mT,
        }

    def _reset_slots(self, slots: Sequence[int]) -> None:
        with torch.no_grad():
            for slot in slots:
                for slab in (*self.stacked_weights.values(), self.scaling):
                    slab[slot].zero_()

    def _is_routed_by_index(self, x: Tensor) -> bool:
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
        return (
            self.device.type == "cuda"
            and self.routing.slot != BASE_SLOT
            and dispatch.get_kernels(x) is not torch_kernels
        )

    def _uniform(self) -> SlotEntry | None:
        """What the one slot of the whole batch holds here."""
        slot = self.routing.slot
        return self.entries[slot] if slot else None

    def weight_matrix(self) -> Tensor:
        """The base weight as (out, in), whatever way round the layer keeps it."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight.mT if is_stored_transposed(self.base_layer) else weight


class LoraLinear(_LoraLayer):
    """base(x) + scaling · B A x around any layer that maps (..., in) to (..., out), quantised ones included."""

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.dora_scales: Tensor | None = None  # (slots, out) fp32, while an adapter here is a DoRA
        self._gather_buffer = GatherBuffer()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_routed_by_index(x):
            return self._by_row(self.base_layer(x, *args, **kwargs), x)
        entry = self._uniform()
        if entry is None:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        dropout = entry.dropout if self.training else 0.0
        if dropout and has_initialization(entry):
            # Dropped is the input of the pair that is trained, not of what its start takes out of the base.
            y = self._add_update(x, args, kwargs, *negated_initialization_of(entry), entry.scaling, 0.0)
            return lora_add(y, x, *trained_weights_of(entry), entry.scaling, dropout=dropout)
        y = self._add_update(x, args, kwargs, *lora_weights_of(entry), entry.scaling, dropout)
        return scale_columns(y, self._get_dora_scale(entry), self._bias) if MAGNITUDE in entry.tensors else y

    def _add_update(
        self, x: Tensor, args: Any, kwargs: dict[str, Any], a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        """base(x) + scaling · B A x."""
        plain = None if args or kwargs else self._get_plain_weights()
        if plain is None:
            return lora_add(self.base_layer(x, *args, **kwargs), x, a, b, scaling, dropout=dropout)
        return lora_linear(x, *plain, a, b, scaling, dropout=dropout)

    def _by_row(self, y: Tensor, x: Tensor) -> Tensor:
        """y = base(x) with each row's update."""
        if not self._can_gather(y, x):
            index = self.routing.index(x)
            y = self._add_stacked(y, x, index)
            return y if self.dora_scales is None else self._scale_by_row(y, index)
        self.routing.check(x)
        rows = len(self.routing.rows)
        flat = x if x.dtype == y.dtype else x.to(y.dtype)
        flat, into = flat.reshape(rows, -1, x.shape[-1]), y.view(rows, -1, y.shape[-1])
        for part in self._get_row_groups(y.dtype):
            part.add_(into, flat)
        return y if self.dora_scales is None else self._scale_by_row(y, self.routing.index(x))

    def _add_stacked(self, y: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """y with what the slabs hold for each row."""
        slabs, dropped = (self._slab(A), self._slab(B)), self._drop_by_row(x)
        if self.trains and any(entry is not None and has_initialization(entry) for entry in self.entries):
            if dropped is not x:
                nothing = torch.zeros_like(slabs[0]), torch.zeros_like(slabs[1])
                y = lora_add_rows(
                    y,
                    x,
                    *replace_initialized_slots(nothing, self.entries, negated_initialization_of),
                    self.scaling,
                    index,
                )
            slabs = replace_initialized_slots(
                slabs, self.entries, lora_weights_of if dropped is x else trained_weights_of
            )
        return lora_add_rows(y, dropped, *slabs, self.scaling, index)

    def _can_gather(self, y: Tensor, x: Tensor) -> bool:
        """Whether the rows' pairs may be taken out of the slabs once for many forwards: nothing about them changes."""
        if self.trains or not self.routing.mixed or self.is_recorded() or dispatch.get_kernels(y) is not torch_kernels:
            return False
        return not (torch.is_grad_enabled() and (y.requires_grad or x.requires_grad)) and can_overwrite(y)

    def _get_row_groups(self, dtype: torch.dtype) -> list[RowGroup]:
        prepared = self.routing.row_cache
        kept = prepared.get(self)
        if kept is None or kept[0] != dtype:
            pairs = tuple(self._get_row_slot(slot) for slot in self.routing.rows)
            key = self.device, pairs
            if key not in prepared:
                prepared[key] = select_row_groups(pairs, self.device)
            # Copies are kept while they take a few times what the slabs do; others are made for each forward.
            keeps = len(pairs) - pairs.count(None) <= _CACHED_ROWS_PER_SLOT * len(self.entries)
            room = self._gather_buffer if keeps else self.routing.room
            kept = (
                dtype,
                gather_row_groups(self.stacked_weights[A], self.stacked_weights[B], prepared[key], dtype, room),
            )
            if keeps:
                prepared[self] = kept
        found: list[RowGroup] = kept[1]
        return found

    def _get_row_slot(self, slot: int) -> RowSlot | None:
        entry = self.entries[slot]
        return None if entry is None else RowSlot(slot, entry.tensors[A].shape[0], entry.scaling)

    def _get_plain_weights(self) -> tuple[Tensor, Tensor | None] | None:
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
        if "forward" in base.__dict__ or type(weight) not in _PLAIN_TYPES or weight.requires_grad:
            return None
        return weight.mT if transposed else weight, bias

    @property
    def _bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def put(self, slot: int, tensors: Mapping[str, Tensor], scaling: float) -> None:
        super().put(slot, tensors, scaling)
        if MAGNITUDE in tensors or self.dora_scales is not None:
            self._refresh_dora_scales()

    def clear(self, slot: int) -> None:
        super().clear(slot)
        if self.dora_scales is not None:
            self._refresh_dora_scales()

    def refresh_from_base(self) -> None:
        super().refresh_from_base()
        self._refresh_dora_scales()

    def reserve(self, slots: int, rank: int, dtype: torch.dtype) -> None:
        super().reserve(slots, rank, dtype)
        if self.dora_scales is not None:
            self._refresh_dora_scales()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SlotLayer:
        super()._apply(fn, recurse)
        if self.dora_scales is not None:
            self._refresh_dora_scales()
        return self

    def _get_dora_scale(self, entry: SlotEntry) -> Tensor:
        """`column_scale` of the entry in use, computed once unless the adapter is trained."""
        if entry.trainable or self.dora_scales is None:
            return self.compute_dora_scale(entry)
        return self.dora_scales[self.routing.slot]

    def compute_dora_scale(self, entry: SlotEntry) -> Tensor:
        """c = m / |W + s B A| of a DoRA, (out,)."""
        held = entry.tensors
        return dora_scale(self.weight_matrix(), held[A], held[B], entry.scaling, held[MAGNITUDE])

    def _refresh_dora_scales(self) -> None:
        has_dora = any(entry is not None and MAGNITUDE in entry.tensors for entry in self.entries)
        with torch.no_grad():
            self.dora_scales = self._compute_dora_scales() if has_dora else None

    def _compute_dora_scales(self) -> Tensor:
        """(slots, out): the scale of every slot's DoRA, ones for what is none."""
        ones = torch.ones(features_of(self.base_layer)[1], device=self.device)
        return torch.stack([self.compute_dora_scale(e) if e and MAGNITUDE in e.tensors else ones for e in self.entries])

    def _scale_by_row(self, y: Tensor, index: Tensor) -> Tensor:
        columns = self._compute_dora_scales() if self.trains else self.dora_scales
        assert columns is not None
        rows = columns[index].repeat_interleave(y.shape[0] // len(index), 0)
        return scale_columns(y, rows.view(y.shape[0], *[1] * (y.ndim - 2), -1), self._bias)

    def _drop_by_row(self, x: Tensor) -> Tensor:
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
