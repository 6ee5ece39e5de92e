"""Packed forwards: one row of tokens, (1, T), of which runs belong to different adapters.

A layer sees T tokens, or one for each run where only the last ones are kept, as a head does. A run of several tokens is
computed with views of the stacked weights, so that nothing is copied; the others share one gathered product. The number
of operations depends on the runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.route import Route
from lora_kit.layers.row_gather import GatherBuffer, RowGroup, RowSlot, gather_row_groups, select_row_groups

if TYPE_CHECKING:
    from lora_kit.layers.slot_layer import SlotLayer

LONG_RUN: Final = 4
"""Tokens of a run from which on it has products of its own."""

Run = tuple[int, int]
"""A slot, and how many consecutive tokens use it."""


class RunRoute(Route):
    """Which slot each token of a packed forward uses.

    Attributes:
        runs: in their order.
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

    def iterate_spans(self, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield (slot, start, end) of the runs of a layer that is given so many tokens; equal neighbors are one."""
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
        short: tokens of all others, gathered.
    """

    dtype: torch.dtype
    long: tuple[LongRun, ...]
    short: tuple[RowGroup, ...]

    def add_(self, y: Tensor, x: Tensor) -> None:
        """Add every run's update to y (T, out), from x (T, in)."""
        for run in self.long:
            run.add_(y, x)
        for group in self.short:
            group.add_(y.unsqueeze(1), x.unsqueeze(1))


def plan_runs(spans: Sequence[tuple[RowSlot | None, int, int]], a: Tensor, b: Tensor, dtype: torch.dtype) -> RunPlan:
    """Return how runs are computed.

    Args:
        spans: what each run uses (None for the base), its first token, and the one after its last.
        a: (S, r, in). b: (S, out, r). Stacked weights.
        dtype: of the activations.
    """
    long, short = list[LongRun](), list[RowSlot | None]()
    for row_slot, start, end in spans:
        is_long = end - start >= LONG_RUN
        short += [None if is_long else row_slot] * (end - start)
        if is_long and row_slot is not None:
            slot, rank, scaling = row_slot
            factors = a[slot, :rank].to(dtype).mT, b[slot, :, :rank].to(dtype).mT
            long.append(LongRun(start, end, *factors, scaling))
    selections = select_row_groups(short, a.device)
    return RunPlan(dtype, tuple(long), tuple(gather_row_groups(a, b, selections, dtype, GatherBuffer())))


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
