"""Packed forwards: one row of tokens, (1, T), of which runs belong to different adapters.

A layer sees T tokens, or one for each run where only the last ones are kept, as a head does. A run of many tokens is
computed with views of the stacked weights, so that nothing is copied; the others share two products (`joined_runs`), or
gathered ones. The number of operations depends on the runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.joined_runs import JoinedRuns, Span, TokenColumns, find_columns, join_weights
from lora_kit.layers.route import Route
from lora_kit.layers.row_gather import (
    GatherBuffer,
    RowCache,
    RowGroup,
    RowSelection,
    RowSlot,
    gather_row_groups,
    select_row_groups,
)

if TYPE_CHECKING:
    from lora_kit.layers.slot_layer import SlotLayer

LONG_RUN: Final = 16
"""Tokens of a run from which on it has products of its own."""
LONG_GATHERED_RUN: Final = 4
"""The same where the others are gathered, which copies the weights for each token."""

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
            if count not in (self.tokens, len(self.runs)):
                raise RoutingError(
                    f"runs of {self.tokens} tokens were routed, but a layer was given {count}",
                    hint="name every token of the forward; a head may be given the last one of each run",
                )
            each = [(slot, length if count == self.tokens else 1) for slot, length in self.runs]
            rows = self._make_route([slot for slot, length in each for _ in range(length)])
            rows.cache_key = self.cache_key
            self._rows[count] = rows
        return self._rows[count]

    def get_spans(self, count: int) -> tuple[tuple[int, int, int], ...]:
        """Return (slot, start, end) of the runs of a layer that is given so many tokens; equal neighbors are one."""
        if count not in self._spans:
            self._spans[count] = tuple(self._iterate_spans(count))
        return self._spans[count]

    def _iterate_spans(self, count: int) -> Iterator[tuple[int, int, int]]:
        start, pending = 0, None
        for slot, length in self.runs:
            end = start + (length if count == self.tokens else 1)
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
class LongRun:
    """A run with products of its own.

    Attributes:
        start, end: its tokens.
        a: (in, r), in the dtype of the activations.
        b: (r, out), likewise.
        scaling: of their product.
    """

    start: int
    end: int
    a: Tensor
    b: Tensor
    scaling: float

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add y += scaling · x A B for these tokens, (T, out) and (T, in)."""
        own = slice(self.start, self.end)
        y[own].addmm_(x[own] @ self.a, self.b, alpha=self.scaling)


@dataclass(frozen=True)
class RunPlan:
    """How a linear layer computes the runs of a forward.

    Attributes:
        dtype: of the activations.
        long: runs with products of their own.
        joined: all others, together; None where they are gathered.
        short: tokens of all others, gathered.
    """

    dtype: torch.dtype
    long: tuple[LongRun, ...]
    joined: JoinedRuns | None
    short: tuple[RowGroup, ...]

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add every run's update to y (T, out), from x (T, in)."""
        for run in self.long:
            run.add_(y, x)
        if self.joined is not None:
            self.joined.add_(y, x)
        for group in self.short:
            group.add_(y.unsqueeze(1), x.unsqueeze(1))


@dataclass(frozen=True)
class RunShape:
    """Which runs are computed how; the same for all layers in which their adapters are the same.

    Attributes:
        long: what each run with products of its own uses, its first token, and the one after its last.
        columns: of short runs that are joined; None where they are gathered.
        selections: of short runs that are gathered.
    """

    long: tuple[tuple[RowSlot, int, int], ...]
    columns: TokenColumns | None
    selections: tuple[RowSelection, ...]


def plan_runs(
    layer: nn.Module,
    cache: RowCache,
    spans: Sequence[tuple[int, int, int]],
    row_slots: Mapping[int, RowSlot | None],
    stacked: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> RunPlan:
    """Return how the runs of a forward are computed.

    Args:
        layer: whose runs these are.
        cache: of the thread.
        spans: slot of each run, its first token, and the one after its last.
        row_slots: what each slot has in this layer; None for nothing.
        stacked: the stacked weights (S, r, in) and (S, out, r).
        dtype: of the activations.
    """
    a, b = stacked
    short = dict.fromkeys(row_slots[slot] for slot, start, end in spans if end - start < LONG_RUN)
    joined = join_weights(layer, cache, tuple(each for each in short if each is not None), stacked, dtype)
    order = None if joined is None else joined.row_slots
    key = spans[-1][2], tuple(row_slots.items()), order, a.device, dtype
    shape = cache.run_shapes.get(key)
    if shape is None:
        owned = [(row_slots[slot], start, end) for slot, start, end in spans]
        shape = cache.run_shapes[key] = _shape_runs(owned, order, a.device, dtype)
    long = [
        LongRun(start, end, a[slot, :rank].to(dtype).mT, b[slot, :, :rank].to(dtype).mT, scaling)
        for (slot, rank, scaling), start, end in shape.long
    ]
    if joined is not None and shape.columns is not None:
        return RunPlan(dtype, tuple(long), JoinedRuns(joined, shape.columns), ())
    return RunPlan(dtype, tuple(long), None, tuple(gather_row_groups(a, b, shape.selections, dtype, GatherBuffer())))


def _shape_runs(
    spans: Sequence[Span], order: Sequence[RowSlot] | None, device: torch.device, dtype: torch.dtype
) -> RunShape:
    """Return which runs are computed how; `order` is that of the joined weights, None without."""
    least = LONG_GATHERED_RUN if order is None else LONG_RUN
    long = tuple((each, start, end) for each, start, end in spans if each is not None and end - start >= least)
    if order is not None:
        rest = [span for span in spans if span[2] - span[1] < least]
        return RunShape(long, find_columns(order, rest, device, dtype), ())
    tokens = [each if end - start < least else None for each, start, end in spans for _ in range(end - start)]
    return RunShape(long, None, tuple(select_row_groups(tokens, device)))


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
