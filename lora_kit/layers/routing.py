"""Which adapter each row of a batch uses, said once for all layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from lora_kit.errors import RoutingError
from lora_kit.layers.row_gather import GatherBuffer

BASE_SLOT: Final = 0
"""The slot that means "no adapter"."""


class Routing:
    """Which slot each row of a batch uses; one object shared by all layers of a bank.

    Attributes:
        mixed: whether rows differ. Compiled code reads this and the index tensors only, so that a swap changes no
            guard.
        slot: the slot of every row; of no meaning while rows differ.
        rows: the slot of each row while they differ, else empty.
        prepared: what layers made ready for rows, by layer; gone when other rows come.
        room: memory for pairs that are taken out of slabs for one forward of one layer.
    """

    def __init__(self) -> None:
        self.mixed = False
        self.slot = BASE_SLOT
        self.rows: tuple[int, ...] = ()
        self._uniform: dict[torch.device, Tensor] = {}
        self._by_row: dict[torch.device, Tensor] = {}
        self.row_cache: dict[Any, Any] = {}
        self._cached_rows: tuple[int, ...] = ()
        self.room = GatherBuffer()

    def route_to_slot(self, slot: int) -> None:
        """Route every row to one slot. Device tensors are written in place, so captured graphs follow."""
        self.mixed, self.slot, self.rows = False, slot, ()
        for tensor in self._uniform.values():
            tensor.fill_(slot)

    def route_to_rows(self, slots: Sequence[int]) -> None:
        """Route row i of the batch to slots[i]."""
        if len(set(slots)) == 1:
            self.route_to_slot(slots[0])
            return
        self.mixed, self.slot, self.rows = True, BASE_SLOT, tuple(slots)
        if self.rows != self._cached_rows:
            self.row_cache, self._cached_rows = {}, self.rows
        for device in self._uniform:
            index = torch.tensor(self.rows, device=device)
            held = self._by_row.get(device)
            # Written in place where the number of rows stays, so captured graphs follow.
            self._by_row[device] = index if held is None or held.shape != index.shape else held.copy_(index)

    @contextlib.contextmanager
    def alone(self, slot: int) -> Iterator[None]:
        """One slot for everything, for a part of one layer's forward; tensors that other layers read stay."""
        before = self.mixed, self.slot
        self.mixed, self.slot = False, slot
        try:
            yield
        finally:
            self.mixed, self.slot = before

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
            self._misfit(x, index.shape[0])
        return index

    def check(self, x: Tensor) -> None:
        """Raise RoutingError unless the batch x (n, ...) can be split evenly between the rows."""
        if self.mixed and x.shape[0] % len(self.rows):
            self._misfit(x, len(self.rows))

    def _misfit(self, x: Tensor, rows: int) -> NoReturn:
        raise RoutingError(
            f"{rows} rows were routed, but a layer was given a batch of {x.shape[0]}",
            hint="name one adapter per row of the batch",
        )
