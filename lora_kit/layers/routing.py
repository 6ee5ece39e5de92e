"""Which adapter each row of a batch uses, in one object for all layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NoReturn, TypeGuard

import torch
from torch import Tensor

from lora_kit.errors import RoutingError
from lora_kit.layers.row_gather import GatherBuffer, RowCache

BASE_SLOT: Final = 0
"""The slot that means "no adapter"."""


class Routing:
    """Which slot each row of a batch uses; one object shared by all layers of a bank.

    Attributes:
        mixed: whether rows differ. Compiled code reads this and the index tensors only, so that a swap changes no
            guard.
        slot: the slot of every row; without meaning while rows differ.
        rows: the slot of each row while they differ, else empty.
        row_cache: what layers prepared for the rows; emptied when other rows come.
        buffer: memory for LoRA weights that one layer gathers for one forward.
    """

    def __init__(self) -> None:
        self.mixed = False
        self.slot = BASE_SLOT
        self.rows: tuple[int, ...] = ()
        self._uniform_index: dict[torch.device, Tensor] = {}
        self._row_index: dict[torch.device, Tensor] = {}
        self.row_cache = RowCache()
        self._cached_rows: tuple[int, ...] = ()
        self.buffer = GatherBuffer()

    def route_to_slot(self, slot: int) -> None:
        """Route every row to one slot. Index tensors are written in place, so captured graphs follow."""
        self.mixed, self.slot, self.rows = False, slot, ()
        for index in self._uniform_index.values():
            index.fill_(slot)

    def route_to_rows(self, slots: Sequence[int]) -> None:
        """Route row i of the batch to slots[i]."""
        if len(set(slots)) == 1:
            self.route_to_slot(slots[0])
            return
        self.mixed, self.slot, self.rows = True, BASE_SLOT, tuple(slots)
        if self.rows != self._cached_rows:
            self.row_cache, self._cached_rows = RowCache(), self.rows
        for device in self._uniform_index:
            index = torch.tensor(self.rows, device=device)
            before = self._row_index.get(device)
            # Written in place where the number of rows stays, so captured graphs follow.
            same_shape = before is not None and before.shape == index.shape
            self._row_index[device] = before.copy_(index) if before is not None and same_shape else index

    @contextlib.contextmanager
    def use_slot(self, slot: int) -> Iterator[None]:
        """Route everything to one slot for a part of one layer's forward. Index tensors stay, for other layers."""
        before = self.mixed, self.slot
        self.mixed, self.slot = False, slot
        try:
            yield
        finally:
            self.mixed, self.slot = before

    def prepare(self, device: torch.device) -> None:
        """Make the index tensor of a device before a forward needs it: compiled code may not create it."""
        if device not in self._uniform_index:
            self._uniform_index[device] = torch.tensor([self.slot], device=device)

    @property
    def slots_in_use(self) -> tuple[int, ...]:
        """The slots of the rows, in the form that `route_to_rows` takes."""
        return self.rows if self.mixed else (self.slot,)

    def get_index(self, x: Tensor) -> Tensor:
        """Return the slots as int64 on the device of x: (1,) while all rows use one, else (rows,).

        Raises:
            RoutingError: the batch x (n, ...) cannot be split evenly between the rows.
        """
        if not self.mixed:
            return self._uniform_index[x.device]
        index = self._row_index[x.device]
        if x.shape[0] % index.shape[0]:
            _raise_mismatch(x, index.shape[0])
        return index

    def check_batch(self, x: Tensor) -> None:
        """Raise RoutingError unless the batch x (n, ...) can be split evenly between the rows."""
        if self.mixed and x.shape[0] % len(self.rows):
            _raise_mismatch(x, len(self.rows))


def forward_each_slot(
    module: str,
    slots: Sequence[int],
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    forward: Callable[[int, tuple[Tensor, ...]], object],
) -> object:
    """Compute the rows of each slot by themselves, and return the outputs in the order of the batch.

    Args:
        module: name of the module's class, for the message.
        slots: of each of R rows.
        args: tensors (n, ...), where n is a multiple of R. kwargs: must be empty.
        forward: from a slot and its part of args, to a tensor or a tuple of tensors with as many entries.

    Raises:
        RoutingError: the module was called with something other than such tensors, or n is not a multiple of R.
    """
    if kwargs or not _is_batch(args):
        raise RoutingError(
            f"a {module} that takes more than tensors of tokens cannot serve rows of different adapters",
            hint="use() one adapter at a time",
        )
    if args[0].shape[0] % len(slots):
        _raise_mismatch(args[0], len(slots))
    slot_of = torch.tensor(slots).repeat_interleave(args[0].shape[0] // len(slots))
    parts, order = list[object](), list[Tensor]()
    for slot in sorted(set(slots)):
        indices = (slot_of == slot).nonzero().squeeze(1)
        parts.append(forward(slot, tuple(x.index_select(0, indices.to(x.device)) for x in args)))
        order.append(indices)
    return _join_outputs(parts, torch.cat(order).argsort())


def _raise_mismatch(x: Tensor, rows: int) -> NoReturn:
    raise RoutingError(
        f"{rows} rows were routed, but a layer was given a batch of {x.shape[0]}",
        hint="name one adapter per row of the batch",
    )


def _is_batch(args: tuple[object, ...]) -> TypeGuard[tuple[Tensor, ...]]:
    """Return whether these are tensors with the same number of entries."""
    tensors = [x for x in args if isinstance(x, Tensor) and x.ndim]
    return bool(args) and len(tensors) == len(args) and len({x.shape[0] for x in tensors}) == 1


def _join_outputs(parts: Sequence[object], order: Tensor) -> object:
    """Return the outputs of parts of a batch in the order of the whole: a tensor, or a tuple of tensors."""
    if isinstance(parts[0], tuple):
        return tuple(_join_outputs(each, order) for each in zip(*parts, strict=True))
    joined = torch.cat([part for part in parts if isinstance(part, Tensor)])
    return joined.index_select(0, order.to(joined.device))
