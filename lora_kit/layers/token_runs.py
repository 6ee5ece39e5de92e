"""Packed forwards: one row of tokens, (1, T), of which runs belong to different adapters.

A layer sees T tokens, or one for each run where only the last ones are kept, as a head does. A run of many tokens is
computed with views of the stacked weights, so that nothing is copied; the others share two products (`joined_runs`), or
two batched ones (`padded_runs`). The number of operations depends on the runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.joined_runs import Span, TokenColumns, add_joined_, can_join, find_columns, join_weights
from lora_kit.layers.padded_runs import PaddedTokens, pad_runs
from lora_kit.layers.route import Route
from lora_kit.layers.row_gather import GatherBuffer, RowCache, RowSlot, gather_weights

if TYPE_CHECKING:
    from lora_kit.layers.slot_layer import SlotLayer

LONG_RUN: Final = 16
"""Tokens of a run from which on it has products of its own."""

Run = tuple[int, int]
"""A slot, and how many consecutive tokens use it."""


class RunRoute(Route):
    """Which slot each token of a packed forward uses.

    Attributes:
        runs: in their order.
        distinct_slots: each slot once.
    """

    def __init__(self, runs: Sequence[Run], make_route: Callable[[Sequence[int]], Route]) -> None:
        super().__init__(tuple(slot for slot, _ in runs), {})
        # Not one slot per entry of an axis: every layer asks for its tokens' slots by `get_rows`.
        self.mixed, self.rows = False, ()
        self.runs = tuple(runs)
        self.cache_key = self.runs
        self.tokens = sum(count for _, count in runs)
        self._make_route = make_route
        self._rows: dict[int, Route] = {}
        self._spans: dict[int, tuple[tuple[int, int, int], ...]] = {}
        self.distinct_slots = tuple(dict.fromkeys(self.slots))

    def get_rows(self, count: int) -> Route:
        """Return the route of a layer that is given so many tokens, each of which is a row.

        Raises:
            RoutingError: these are neither all tokens nor the last one of each run.
        """
        if count not in self._rows:
            rows = self._make_route([slot for slot, length in self._list_runs(count) for _ in range(length)])
            rows.cache_key = self.cache_key
            self._rows[count] = rows
        return self._rows[count]

    def get_spans(self, count: int) -> tuple[tuple[int, int, int], ...]:
        """Return (slot, start, end) of the runs of a layer that is given so many tokens; equal neighbors are one.

        Raises:
            RoutingError: as in `get_rows`.
        """
        if count not in self._spans:
            self._spans[count] = tuple(self._iterate_spans(count))
        return self._spans[count]

    def _list_runs(self, count: int) -> Sequence[Run]:
        """Return the runs of a layer that is given so many tokens."""
        if count == self.tokens:
            return self.runs
        if count != len(self.runs):
            raise RoutingError(
                f"runs of {self.tokens} tokens were routed, but a layer was given {count}",
                hint="name every token of the forward; a head may be given the last one of each run",
            )
        return [(slot, 1) for slot, _ in self.runs]

    def _iterate_spans(self, count: int) -> Iterator[tuple[int, int, int]]:
        start, pending = 0, None
        for slot, length in self._list_runs(count):
            end = start + length
            if pending is not None and pending[0] == slot:
                pending = slot, pending[1], end
            else:
                if pending is not None:
                    yield pending
                pending = slot, start, end
            start = end
        if pending is not None:
            yield pending


@dataclass(frozen=True)
class RunShape:
    """Which runs are computed how; the same for all layers in which their adapters are the same.

    Attributes:
        long: what each run with products of its own uses, its first token, and the one after its last.
        short: the others.
        joined: the adapters of short runs, each once, where these may be joined; else empty.
        device: of the layers.
        columns: of short runs that are joined, by the order of the joined weights and their dtype.
    """

    long: tuple[tuple[RowSlot, int, int], ...]
    short: tuple[Span, ...]
    joined: tuple[RowSlot, ...]
    device: torch.device
    columns: dict[tuple[tuple[RowSlot, ...], torch.dtype], TokenColumns] = field(default_factory=dict)

    @cached_property
    def padded(self) -> list[PaddedTokens]:
        """Short runs as they are computed while they are not joined."""
        return pad_runs(self.short, self.device)

    def get_columns(self, order: tuple[RowSlot, ...], device: torch.device, dtype: torch.dtype) -> TokenColumns:
        """Return which columns of weights that are joined in this order each token of a short run uses."""
        if (order, dtype) not in self.columns:
            self.columns[order, dtype] = find_columns(order, self.short, device, dtype)
        return self.columns[order, dtype]


class LayerRuns:
    """Adds the updates of a layer's runs.

    Args:
        layer: whose runs these are.
        cache: of the thread.
        stacked: the stacked weights (S, r, in) and (S, out, r).
    """

    def __init__(self, layer: nn.Module, cache: RowCache, stacked: tuple[Tensor, Tensor]) -> None:
        self.layer, self.cache, self.stacked = layer, cache, stacked

    def add_(self, y: Tensor, x: Tensor, route: RunRoute, row_slots: tuple[RowSlot | None, ...]) -> None:
        """Add every run's update.

        Args:
            y: (T, out), overwritten. x: (T, in), in the dtype of y.
            row_slots: what each distinct slot of the route has in this layer; None for nothing.
        """
        count = x.shape[0]
        shape = self._get_shape(route, count, row_slots)
        for row_slot, start, end in shape.long:
            a, b = self._get_weights(row_slot, y.dtype)
            y[start:end].addmm_(x[start:end] @ a, b, alpha=row_slot.scaling)
        joined = join_weights(self.layer, self.cache, shape.joined, self.stacked, y.dtype) if shape.joined else None
        if joined is not None:
            add_joined_(y, x, joined, shape.get_columns(joined.row_slots, y.device, y.dtype))
            return
        for padded, weights in zip(shape.padded, self._get_padded_weights(shape, count, y.dtype), strict=True):
            padded.add_(y, x, *weights)

    def _get_shape(self, route: RunRoute, count: int, row_slots: tuple[RowSlot | None, ...]) -> RunShape:
        device = self.stacked[0].device
        key = count, row_slots, device
        shape = self.cache.run_shapes.get(key)
        if shape is None:
            by_slot = dict(zip(route.distinct_slots, row_slots, strict=True))
            spans = [(by_slot[slot], start, end) for slot, start, end in route.get_spans(count)]
            shape = self.cache.run_shapes[key] = shape_runs(spans, device)
        return shape

    def _get_weights(self, row_slot: RowSlot, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (in, r) and (r, out) of an adapter: views that stay, or copies that go with the runs."""
        a, b = self.stacked
        kept = self.cache.slot_views if a.dtype == dtype else self.cache.slot_copies
        (slot, rank, _), key = row_slot, (self.layer, row_slot.slot, dtype)
        if key not in kept:
            kept[key] = a[slot, :rank].to(dtype).mT, b[slot, :, :rank].to(dtype).mT
        return kept[key]

    def _get_padded_weights(self, shape: RunShape, count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return the weights of short runs that are not joined."""
        if not shape.padded:
            return []
        kept, key = self.cache.padded_weights, (self.layer, count, dtype)
        if key not in kept:
            selections = [padded.selection for padded in shape.padded]
            kept[key] = gather_weights(*self.stacked, selections, dtype, GatherBuffer())
        return kept[key]


def shape_runs(spans: Sequence[Span], device: torch.device) -> RunShape:
    """Return which runs are computed how."""
    long = tuple((each, start, end) for each, start, end in spans if each is not None and end - start >= LONG_RUN)
    short = tuple(span for span in spans if span[2] - span[1] < LONG_RUN)
    adapters = tuple(sorted({each for each, _, _ in short if each is not None}))
    return RunShape(long, short, adapters if can_join(adapters) else (), device)


def check_token_count(route: RunRoute, inputs: Sequence[Tensor]) -> None:
    """Raise RoutingError if a model was given another number of tokens than a route has."""
    count = count_tokens(inputs[0]) if inputs else route.tokens
    if count != route.tokens:
        hint = "name every token of the forward, those of padding too"
        raise RoutingError(f"runs of {route.tokens} tokens were routed, but the model was given {count}", hint=hint)


def count_tokens(x: Tensor) -> int:
    """Return how many tokens there are in x (..., in), or in integers (...) that are looked up."""
    return math.prod(x.shape[:-1] if x.is_floating_point() else x.shape)


def forward_tokens(layer: SlotLayer, route: RunRoute, x: Tensor) -> Tensor:
    """Compute a packed forward of a layer with each token as a row of its own.

    Args:
        x: (..., in), or integers (...) that are looked up.

    Raises:
        RoutingError: the layer does not compute tokens by themselves, and adapters of the runs cover it.
    """
    check_runs(layer, route)
    lead = x.shape[:-1] if x.is_floating_point() else x.shape
    count = count_tokens(x)
    with layer.routing.use_route(route.get_rows(count)):
        y: Tensor = layer(x.reshape(count, 1, *x.shape[len(lead) :]))
    return y.reshape(*lead, *y.shape[2:])


def check_runs(layer: SlotLayer, route: RunRoute) -> None:
    """Raise RoutingError if a layer that runs of different adapters cover does not compute tokens by themselves."""
    reason = layer.reason_no_runs()
    if reason is not None and any(layer.entries[slot] for slot in route.slots):
        hint = "use() one adapter at a time, or adapters that leave it alone"
        raise RoutingError(f"runs of different adapters: {reason}", hint=hint)


def reason_not_tokenwise(module: nn.Module) -> str | None:
    """Return why a black box may mix its tokens; None for a single layer, which computes each by itself."""
    if any(True for _ in module.children()):
        return f"a {type(module).__name__} of several layers may mix its tokens"
    return None
