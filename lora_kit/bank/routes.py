"""The route in use, those that open blocks return to, and whether a batch has the rows that were routed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Final

import torch
from torch import Tensor, nn

from lora_kit.errors import RoutingError
from lora_kit.layers.routing import Routing

_INPUT_NAMES: Final = ("input_ids", "inputs_embeds", "decoder_input_ids")
"""Arguments of transformers' models with one entry per row."""


class RouteStack:
    """The route in use, and the routes that open blocks return to.

    Args:
        routing: what the layers read.
    """

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._outer: list[tuple[int, ...]] = []

    @property
    def slots_in_use(self) -> set[int]:
        """Slots that are in use now, or again after a block."""
        return {*self._routing.slots_in_use, *chain.from_iterable(self._outer)}

    @property
    def is_inside_block(self) -> bool:
        return bool(self._outer)

    def enter(self, slots: Sequence[int]) -> None:
        """Begin a block in which row i goes to slots[i]."""
        self._outer.append(self._routing.slots_in_use)
        self._routing.route_to_rows(slots)

    def leave(self) -> None:
        """End the innermost block."""
        self._routing.route_to_rows(self._outer.pop())

    def get_state(self) -> tuple[int, tuple[int, ...]]:
        """Return the number of open blocks, and the slots in use."""
        return len(self._outer), self._routing.slots_in_use


@contextlib.contextmanager
def check_batch_rows(model: nn.Module, rows: int, *, get_state: Callable[[], object]) -> Iterator[None]:
    """Check, within a block, that every forward's batch can be split evenly between so many rows.

    Layers check it only where rows differ; this also checks it where all rows go to one adapter.

    Args:
        get_state: returns another value in blocks within this one, which have rows of their own.

    Raises:
        RoutingError: in the forward.
    """
    state = get_state()

    def check(_: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        # A check of the number of rows would make compiled code be compiled again for each.
        if torch.compiler.is_compiling() or get_state() != state:
            return
        batch = next(
            (kwargs[name] for name in _INPUT_NAMES if isinstance(kwargs.get(name), Tensor)), args[0] if args else None
        )
        if isinstance(batch, Tensor) and batch.ndim and batch.shape[0] % rows:
            raise RoutingError(
                f"{rows} rows were routed, but the model was given a batch of {batch.shape[0]}",
                hint="name one adapter per row of the batch",
            )

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
