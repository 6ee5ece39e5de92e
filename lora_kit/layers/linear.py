"""Linear layers of every make with LoRA weights beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.layers.initialization import (
    MAGNITUDE,
    A,
    B,
    compute_trained_weights,
    has_initialization,
    lora_weights_of,
    negate_initialization,
    replace_initialized_slots,
)
from lora_kit.layers.introspect import features_of, is_stored_transposed, reason_black_box, unwrap_module
from lora_kit.layers.route import BASE_SLOT, Route
from lora_kit.layers.routing import Routing
from lora_kit.layers.row_gather import RowCache, RowGroup, RowSlot, gather_row_groups, select_row_groups
from lora_kit.layers.row_spans import can_span, list_row_spans
from lora_kit.layers.slot_entry import SlotEntry
from lora_kit.layers.slot_layer import SlotLayer
from lora_kit.layers.token_runs import LayerRuns, RunRoute, check_runs, count_tokens
from lora_kit.ops import dispatch, torch_kernels
from lora_kit.ops.dora import dora_scale, scale_columns
from lora_kit.ops.lora import lora_add, lora_add_rows, lora_linear
from lora_kit.ops.lora_functions import can_overwrite
from lora_kit.ops.lora_spans import LoraSpan, lora_add_spans, lora_linear_spans

_CACHED_ROWS_PER_SLOT: Final = 4
"""Rows with an adapter, for each slot, whose LoRA weights are cached from one forward to the next."""


class _LoraLayer(SlotLayer):
    """A layer whose adapters are LoRA weights: `lora_A` (slots, r, in) and `lora_B` (slots, out, r).

    In memory both have the rank before the features: weights of a lower rank are one contiguous piece of each, and the
    products of a batch read B in its memory order.
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
                for stacked in (*self.stacked_weights.values(), self.scaling):
                    stacked[slot].zero_()

    def _is_routed_by_index(self, route: Route, x: Tensor) -> bool:
        """Return whether slots are read from a tensor.

        Compiled and captured inference always reads them there, so that a swap changes no guard and no graph. On CUDA a
        forward that is not captured does so too, where there are kernels for it: a capture may run only kernels that
        were loaded before.
        """
        if route.mixed:
            return True
        if self.trains and torch.is_grad_enabled():
            return False
        if self.is_recorded():
            return True
        return self.device.type == "cuda" and route.slot != BASE_SLOT and dispatch.get_kernels(x) is not torch_kernels

    def _get_entry(self, route: Route) -> SlotEntry | None:
        """Return what the one slot of the whole batch holds here."""
        slot = route.slot
        return self.entries[slot] if slot else None

    def compute_updated_weight(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        a, b = lora_weights_of(entry)
        delta = (b.to(weight.dtype) @ a.to(weight.dtype)).mul_(entry.scaling)
        return weight + (delta.mT if is_stored_transposed(self.base_layer) else delta)

    def weight_matrix(self) -> Tensor:
        """Return the base weight as (out, in), in whichever order the layer keeps it."""
        weight = unwrap_module(self).weight
        assert isinstance(weight, Tensor)
        return weight.mT if is_stored_transposed(self.base_layer) else weight


class LoraLinear(_LoraLayer):
    """base(x) + scaling · B A x around any layer that maps (..., in) to (..., out), quantized ones included.

    Attributes:
        dora_scales: (slots, out) fp32, while an adapter here is a DoRA; else None.
    """

    def __init__(self, base_layer: nn.Module, routing: Routing) -> None:
        super().__init__(base_layer, routing)
        self.dora_scales: Tensor | None = None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        route = self.routing.get_route()
        if isinstance(route, RunRoute):
            return self._forward_runs(route, self.call_base(x, *args, **kwargs), x)
        if self._is_routed_by_index(route, x):
            spans = self._list_spans(route, x)
            if spans:
                return self.add_spans(x, args, kwargs, spans)
            return self._forward_rows(route, self.call_base(x, *args, **kwargs), x)
        entry = self._get_entry(route)
        if entry is None:
            y: Tensor = self.call_base(x, *args, **kwargs)
            return y
        dropout = entry.dropout if self.training else 0.0
        if dropout and has_initialization(entry):
            # Dropout is for the input of the trained weights, not of what their initialization takes from the base.
            y = self._add_update(x, args, kwargs, *negate_initialization(entry), entry.scaling, 0.0)
            return lora_add(y, x, *compute_trained_weights(entry), entry.scaling, dropout=dropout)
        y = self._add_update(x, args, kwargs, *lora_weights_of(entry), entry.scaling, dropout)
        return scale_columns(y, self._get_dora_scale(route, entry), self._bias) if MAGNITUDE in entry.tensors else y

    def _add_update(
        self,
        x: Tensor,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Return base(x) + scaling · B A x."""
        plain = None if args or kwargs else self._get_plain_weights()
        if plain is None:
            return lora_add(self.call_base(x, *args, **kwargs), x, a, b, scaling, dropout=dropout)
        return lora_linear(x, *plain, a, b, scaling, dropout=dropout)

    def add_spans(
        self, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object], spans: Sequence[LoraSpan]
    ) -> Tensor:
        """Return base(x) with the update of each span of tokens."""
        plain = None if args or kwargs else self._get_plain_weights()
        if plain is None:
            return lora_add_spans(self.call_base(x, *args, **kwargs), x, spans)
        return lora_linear_spans(x, *plain, spans)

    def _list_spans(self, route: Route, x: Tensor) -> list[LoraSpan]:
        """Return the tokens of each adapter in a batch that is trained, where they can be computed so; else nothing."""
        if not (self.trains and torch.is_grad_enabled()) or self.is_recorded():
            return []
        entries = [self.entries[slot] for slot in route.rows]
        if not can_span(entries):
            return []
        self.routing.check_rows(route, x, self)
        return list_row_spans(entries, count_tokens(x), training=self.training)

    def _forward_rows(self, route: Route, y: Tensor, x: Tensor) -> Tensor:
        """Return y = base(x) with each row's update."""
        if not (route.mixed and self._can_gather(y, x)):
            if not self.is_recorded() and not any(self.entries[slot] for slot in route.slots):
                return y
            self.routing.check_rows(route, x, self)
            y = self._add_stacked(route, y, x)
            return self._scale_rows(route, y, x)
        groups = self._get_row_groups(route, y.dtype)
        if not groups:
            return y
        self.routing.check_rows(route, x, self)
        rows = len(route.rows)
        flat = x if x.dtype == y.dtype else x.to(y.dtype)
        flat, into = flat.reshape(rows, -1, x.shape[-1]), y.view(rows, -1, y.shape[-1])
        for group in groups:
            group.add_(into, flat)
        return self._scale_rows(route, y, x)

    def _forward_runs(self, route: RunRoute, y: Tensor, x: Tensor) -> Tensor:
        """Return y = base(x) with the update of each run of tokens."""
        check_runs(self, route)
        row_slots = self._get_row_slots(route.distinct_slots)
        if not any(row_slots):
            return y
        count = count_tokens(x)
        flat = x.reshape(count, -1)
        if not self._can_gather(y, x):
            rows, into = route.get_rows(count), y.reshape(count, -1)
            return self._forward_rows(rows, into.unsqueeze(1), flat.unsqueeze(1)).reshape(y.shape)
        into, (a, b) = y.view(count, -1), self._get_stacks(A, B)
        runs = LayerRuns(self, self.routing.get_row_cache(route), (a, b))
        runs.add_(into, flat if flat.dtype == y.dtype else flat.to(y.dtype), route, row_slots)
        if self.dora_scales is None:
            return y
        return self._scale_rows(route.get_rows(count), into.unsqueeze(1), flat.unsqueeze(1)).view(y.shape)

    def _add_stacked(self, route: Route, y: Tensor, x: Tensor) -> Tensor:
        """Return y with what the stacked weights hold for each row."""
        index, dropped = self.routing.get_index(route, x), self._drop_rows(route, x)
        a, b = self._get_stacks(A, B)
        if self.trains and any(entry is not None and has_initialization(entry) for entry in self.entries):
            if dropped is not x:
                zeros = torch.zeros_like(a), torch.zeros_like(b)
                negated = replace_initialized_slots(zeros, self.entries, negate_initialization)
                y = lora_add_rows(y, x, *negated, self.scaling, index)
            weights_of = lora_weights_of if dropped is x else compute_trained_weights
            a, b = replace_initialized_slots((a, b), self.entries, weights_of)
        return lora_add_rows(y, dropped, a, b, self.scaling, index)

    def _can_gather(self, y: Tensor, x: Tensor) -> bool:
        """Return whether LoRA weights may be gathered once for many forwards: nothing changes them."""
        if self.trains or self.is_recorded() or dispatch.get_kernels(y) is not torch_kernels:
            return False
        return not (torch.is_grad_enabled() and (y.requires_grad or x.requires_grad)) and can_overwrite(y)

    def _get_row_groups(self, route: Route, dtype: torch.dtype) -> list[RowGroup]:
        cache = self.routing.get_row_cache(route)
        cached = cache.groups.get(self)
        return cached[1] if cached is not None and cached[0] == dtype else self._gather_row_groups(route, cache, dtype)

    def _gather_row_groups(self, route: Route, cache: RowCache, dtype: torch.dtype) -> list[RowGroup]:
        row_slots = self._get_row_slots(route.rows)
        key = self.device, row_slots
        if key not in cache.selections:
            cache.selections[key] = select_row_groups(row_slots, self.device)
        # Copies are cached while they take a few times the memory of the stacked weights, else made in each forward.
        can_cache = len(row_slots) - row_slots.count(None) <= _CACHED_ROWS_PER_SLOT * len(self.entries)
        buffer = self.routing.get_buffer(self if can_cache else None)
        stacked = self.stacked_weights  # read once: another thread may put larger ones in their place
        groups = gather_row_groups(stacked[A], stacked[B], cache.selections[key], dtype, buffer)
        if can_cache:
            cache.groups[self] = dtype, groups
        return groups

    def _get_row_slots(self, slots: Sequence[int]) -> tuple[RowSlot | None, ...]:
        """Return what each of some slots has here; None for the base, and for an adapter that leaves it alone."""
        entries = self.entries
        return tuple(
            [
                None if (entry := entries[slot]) is None else entry.row_slot or self._name_row_slot(slot, entry)
                for slot in slots
            ]
        )

    def _name_row_slot(self, slot: int, entry: SlotEntry) -> RowSlot:
        entry.row_slot = RowSlot(slot, entry.tensors[A].shape[0], entry.scaling)
        return entry.row_slot

    def _get_plain_weights(self) -> tuple[Tensor, Tensor | None] | None:
        """Return weight (out, in) and bias of a base that computes x Wᵀ + bias with a frozen W; None for others."""
        base = self.base_layer
        transposed = type(base) is not nn.Linear
        if transposed and type(base).__name__ != "Conv1D":
            return None
        parameters = base._parameters
        weight = parameters.get("weight")
        if weight is None or weight.requires_grad or reason_black_box(base) is not None:
            return None
        return weight.mT if transposed else weight, parameters.get("bias")

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

    def compute_updated_weight(self, entry: SlotEntry, weight: Tensor) -> Tensor:
        updated = super().compute_updated_weight(entry, weight)
        if MAGNITUDE not in entry.tensors:
            return updated
        scale = self.compute_dora_scale(entry)
        return (updated * (scale if is_stored_transposed(self.base_layer) else scale.unsqueeze(1))).to(weight.dtype)

    def _get_dora_scale(self, route: Route, entry: SlotEntry) -> Tensor:
        """Return the scale of the entry in use, computed once unless the adapter is trained."""
        scales = self.dora_scales
        return self.compute_dora_scale(entry) if entry.trainable or scales is None else scales[route.slot]

    def compute_dora_scale(self, entry: SlotEntry) -> Tensor:
        """Return c = m / |W + s B A| of a DoRA, (out,) fp32."""
        tensors = entry.tensors
        return dora_scale(self.weight_matrix(), tensors[A], tensors[B], entry.scaling, tensors[MAGNITUDE])

    def _refresh_dora_scales(self) -> None:
        has_dora = any(entry is not None and MAGNITUDE in entry.tensors for entry in self.entries)
        with torch.no_grad():
            self.dora_scales = self._compute_dora_scales() if has_dora else None

    def _compute_dora_scales(self) -> Tensor:
        """Return the scale of every slot, (slots, out) fp32: ones where a slot holds no DoRA."""
        ones = torch.ones(features_of(self.base_layer)[1], device=self.device)
        return torch.stack([self.compute_dora_scale(e) if e and MAGNITUDE in e.tensors else ones for e in self.entries])

    def _scale_rows(self, route: Route, y: Tensor, x: Tensor) -> Tensor:
        """Return y with the scales of the rows that use a DoRA."""
        columns = self.dora_scales
        if columns is None:
            return y
        if self.trains:
            columns = self._compute_dora_scales()
        index = self.routing.get_index(route, x)
        rows = columns[index].repeat_interleave(y.shape[0] // len(index), 0)
        return scale_columns(y, rows.view(y.shape[0], *[1] * (y.ndim - 2), -1), self._bias)

    def _drop_rows(self, route: Route, x: Tensor) -> Tensor:
        """Return x (n, ..., in) with each row's own dropout."""
        if not (self.trains and self.training and route.rows):
            return x
        entries = (self.entries[slot] for slot in route.rows)
        keep = torch.tensor([1 - entry.dropout if entry else 1.0 for entry in entries], device=x.device)
        keep = keep.repeat_interleave(x.shape[0] // len(keep)).view(-1, *[1] * (x.ndim - 1))
        return x * (torch.bernoulli(keep.expand(x.shape)) / keep).to(x.dtype)
