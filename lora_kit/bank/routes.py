"""Which routes contexts chose, which blocks are open, and whether a batch has the rows that were routed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Final
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.routing import BASE_SLOT, Route, Routing

_INPUT_NAMES: Final = ("input_ids", "inputs_embeds", "decoder_input_ids")
"""Arguments of transformers' models with one entry per row."""


class _Choice:
    """That a context chose a route. It lives as long as the context uses that route, or will return to it."""

    def __init__(self, route: Route) -> None:
        self.slots = route.slots


class RouteChoices:
    """The routes that contexts chose themselves, by `use` or in a block. Others they only began with.

    Args:
        routing: what the layers read.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._choice: ContextVar[_Choice | None] = ContextVar("choice", default=None)
        self._choices: set[ReferenceType[_Choice]] = set()
        self._open_blocks: set[RouteBlock] = set()

    @property
    def is_block_open(self) -> bool:
        """Whether any context is inside a block."""
        return bool(self._open_blocks)

    def find_chosen_slots(self, *, by_others: bool = False) -> set[int]:
        """Return the slots that a context chose to use, or returns to after a block, or will begin with.

        Args:
            by_others: only those of other contexts that there are.
        """
        choices = {reference() for reference in self._choices.copy()} - {None}
        if by_others:
            choices.discard(self._choice.get())
        slots = {slot for choice in choices if choice is not None for slot in choice.slots}
        return slots if by_others else {*slots, *self._routing.default.slots}

    def use(self, slot: int) -> None:
        """Route the caller to one slot, and the contexts that begin later."""
        route = self._routing.make_route((slot,))
        self._routing.default = route
        self._choose(route)

    def enter_block(self, slots: Sequence[int], *, row_count: int | None) -> RouteBlock:
        """Begin a block in which row i of the caller's batches goes to slots[i]."""
        block = RouteBlock(self, self._routing.get_route(), self._choice.get())
        self._open_blocks.add(block)
        self._choose(self._routing.make_route(slots, row_count=row_count))
        return block

    def leave_block(self, block: RouteBlock) -> None:
        """End a block. The routes are put back by value: a generator may be resumed in another context."""
        self._open_blocks.discard(block)
        self._choice.set(block.choice)
        self._routing.set_route(block.route)
        block.route = block.choice = None  # an exception that passed here keeps the block for long

    def leave_slot(self, slot: int) -> None:
        """Route the caller, and the contexts that begin later, to the base where they would use a slot."""
        if slot in self._routing.get_route().slots:
            self.use(BASE_SLOT)
        if slot in self._routing.default.slots:
            self._routing.default = self._routing.make_route((BASE_SLOT,))

    def forget(self) -> None:
        """Route the caller and the contexts that begin later to the base, by nobody's choice."""
        self._routing.default = self._routing.make_route((BASE_SLOT,))
        self._routing.set_route(None)
        self._choice.set(None)

    def _choose(self, route: Route) -> None:
        choice = _Choice(route)
        self._choices.add(ref(choice, self._choices.discard))
        self._choice.set(choice)
        self._routing.set_route(route)


class RouteBlock:
    """An open block of `using` or `rows`; with it, what its context returns to."""

    def __init__(self, choices: RouteChoices, route: Route, choice: _Choice | None) -> None:
        self._choices = choices
        self.route: Route | None = route
        self.choice = choice

    def __enter__(self) -> None:
        """Do nothing: the block began when it was made."""

    def __exit__(self, *exception: object) -> None:
        self._choices.leave_block(self)


class Lease:
    """A slot that keeps its adapter until `release`, whatever happens to the name. Made by `bank.lease`.

    A lease is a context manager too. One that is no longer reachable is released.

    Attributes:
        slot: of the adapter, in every layer.
        digest: of the adapter.
    """

    def __init__(self, slot: int, digest: str, route: Route) -> None:
        self.slot = slot
        self.digest = digest
        self._route: Route | None = route

    def release(self) -> None:
        """Let the slot go. A second call does nothing."""
        self._route = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class RowCountCheck:
    """A hook of the model that raises RoutingError for a batch which has not one row for each that `rows` named.

    Layers split any multiple evenly, as `generate` needs it: there, beams and several returned sequences belong to the
    row they come from. In another call a multiple is a mistake.

    Args:
        routing: what the layers read.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing

    def __call__(self, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Check the batch of a call of the model.

        Raises:
            RoutingError: it has other rows.
        """
        # A check of the number of rows would make compiled code be compiled again for each.
        if torch.compiler.is_compiling():
            return
        batch = next(
            (kwargs[name] for name in _INPUT_NAMES if isinstance(kwargs.get(name), Tensor)), args[0] if args else None
        )
        size = batch.shape[0] if isinstance(batch, Tensor) and batch.ndim else 0
        route = self._routing.peek_route()
        count = route.row_count
        self._routing.begin_forward(route, size or count or 0)
        if not count or not size or size == count:
            return
        if size % count or not _is_generating():
            raise RoutingError(
                f"{count} rows were routed, but the model was given a batch of {size}",
                hint="name one adapter per row of the batch",
            )


def _is_generating() -> bool:
    """Return whether the caller was called, however indirectly, by a function that is named `generate`."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "generate":
            return True
    return False
