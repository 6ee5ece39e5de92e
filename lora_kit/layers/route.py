"""A route: which slot each row of a batch uses, as a value."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BASE_SLOT: Final = 0
"""The slot that means "no adapter"."""

Index = dict[torch.device, Tensor]
"""The slots of a route as int64, by device: (1,) where all rows use one, else (rows,)."""


class Route:
    """Which slot each row of a batch uses. It never changes; contexts and threads may share it.

    A slot keeps its weights while there is a `Route` that names it.

    Attributes:
        slots: the slot of every row, or one slot per row where they differ.
        mixed: whether rows differ. Compiled code reads this and the index tensors only, so that a swap changes no
            guard.
        slot: the slot of every row; without meaning where rows differ.
        rows: the slot of each row where they differ, else empty.
        row_count: how many rows a batch must have; None: any number.
        index: the slots as tensors.
        runs: of tokens, in a packed forward; else empty. See `token_runs`.
        cache_key: what layers prepare for it is kept for the next route with the same; empty where rows do not differ.
    """

    runs: tuple[tuple[int, int], ...] = ()

    def __init__(self, slots: tuple[int, ...], index: Index, *, row_count: int | None = None) -> None:
        self.slots = slots
        self.mixed = len(slots) > 1
        self.slot = BASE_SLOT if self.mixed else slots[0]
        self.rows = slots if self.mixed else ()
        self.cache_key: tuple[object, ...] = self.rows
        self.row_count = row_count
        self.index = index

    def add_index(self, device: torch.device) -> Tensor:
        """Return the slots as a tensor on a device, which is made at most once."""
        if device not in self.index:
            add_index(self.index, self.slots, device)
        return self.index[device]


def add_index(index: Index, slots: tuple[int, ...], device: torch.device) -> None:
    """Add the slots as a tensor on a device, unless they are there."""
    if device not in index:
        with torch.inference_mode(False):  # memory made in inference mode could not be used in training
            uniform = len(slots) == 1
            index[device] = torch.full((1,), slots[0], device=device) if uniform else torch.tensor(slots, device=device)
