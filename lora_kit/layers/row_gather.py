"""The pairs of a batch's rows, taken out of a layer's slabs once and used by every forward until the routing changes.

Without gradients and without kernels that read slabs by slot, a forward would gather each row's A and B again for
every token that is generated, which costs more than the products do. Rows that use the base are left out, and rows of
much lower rank than the others are a part of their own, so nobody pays for what others use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class RowSlot(NamedTuple):
    """What one row of a batch uses."""

    slot: int
    rank: int
    scaling: float


@dataclass
class RowGroup:
    """Some rows of a batch with their pairs.

    Attributes:
        rows: which: a range, or their indices (R',) int64; None for all of them.
        a: (R', in, r). b: (R', r, out). In the dtype of the activations.
        scaling: one number, or (R', 1, 1) where the rows' differ.
    """

    rows: slice | Tensor | None
    a: Tensor
    b: Tensor
    scaling: float | Tensor

    def add_(self, y: Tensor, x: Tensor) -> None:
        """y += scaling · x A B for these rows.

        Args:
            y: (R, T, out), overwritten. x: (R, T, in) in the dtype of y.
        """
        rows, alpha = self.rows, 1.0
        chosen = x.index_select(0, rows) if isinstance(rows, Tensor) else x if rows is None else x[rows]
        h = torch.bmm(chosen, self.a)
        if isinstance(self.scaling, Tensor):
            h = (h * self.scaling).to(h.dtype)
        else:
            alpha = self.scaling  # as a part of the last product it costs nothing
        if isinstance(rows, Tensor):
            y.index_add_(0, rows, torch.bmm(h, self.b), alpha=alpha)
        else:
            (y if rows is None else y[rows]).baddbmm_(h, self.b, alpha=alpha)


@dataclass(frozen=True)
class RowSelection:
    """Rows that are done together, and what of the slabs they use.

    Attributes:
        rows, scaling: as in `Part`.
        slots: one per row: a range, or their indices (R',) int64.
        rank: the highest of theirs.
    """

    rows: slice | Tensor | None
    slots: slice | Tensor
    rank: int
    scaling: float | Tensor


class GatherBuffer:
    """Memory that taken pairs lie in, used again from one routing to the next.

    With fresh memory each time, half of a first forward's extra cost was the kernel's: pages to map, also for
    activations, since what is kept between them leaves the heap in pieces.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, slab: Tensor, choice: RowSelection, dtype: torch.dtype) -> Tensor:
        """(R', rank, features) of a slab (S, r, features): where it lies if the slots follow one another, else a copy.

        A copy lies here under the name, until the name is used again.
        """
        if choice.rank < slab.shape[1]:
            slab = slab[:, : choice.rank]
        if isinstance(choice.slots, slice):
            taken = slab[choice.slots]
            return taken if taken.dtype == dtype else self._place(name, taken.shape, dtype, slab.device).copy_(taken)
        shape = (len(choice.slots), *slab.shape[1:])
        place = self._place(name, shape, dtype, slab.device)
        if dtype != slab.dtype:
            return place.copy_(slab.index_select(0, choice.slots))
        return torch.index_select(slab, 0, choice.slots, out=place)

    def _place(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        held, size = self._held.get(name), math.prod(shape)
        if held is None or held.numel() < size or (held.dtype, held.device) != (dtype, device):
            # Memory made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                held = self._held[name] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


def select_row_groups(pairs: Sequence[RowSlot | None], device: torch.device) -> list[RowSelection]:
    """How a batch is taken apart, at most in two; the same for all layers in which its rows use the same pairs.

    Args:
        pairs: of each row; None for the base.
    """
    held = {row: pair for row, pair in enumerate(pairs) if pair is not None}
    return [_select_rows(rows, len(pairs), device) for rows in _split_by_rank(held)]


def gather_row_groups(
    a: Tensor, b: Tensor, chosen: Sequence[RowSelection], dtype: torch.dtype, room: GatherBuffer
) -> list[RowGroup]:
    """The parts of a batch.

    Args:
        a: (S, r, in). b: (S, out, r). Slabs, in memory the rank before the features.
        dtype: of the activations.
    """
    return [
        RowGroup(
            rows=choice.rows,
            a=room.take(f"a{number}", a, choice, dtype).mT,
            b=room.take(f"b{number}", b.mT, choice, dtype),
            scaling=choice.scaling,
        )
        for number, choice in enumerate(chosen)
    ]


def _split_by_rank(rows: dict[int, RowSlot]) -> list[dict[int, RowSlot]]:
    """Rows in one part, or in two where paying the highest rank for all of them were half as much work again."""
    ranks = [pair.rank for pair in rows.values()]
    if not rows or 2 * max(ranks) * len(ranks) <= 3 * sum(ranks):
        return [rows] if rows else []
    high = max(ranks)
    # The split that costs least: each part pays its own highest rank.
    bound = min(set(ranks) - {high}, key=lambda low: sum(low if rank <= low else high for rank in ranks))
    low = {row: pair for row, pair in rows.items() if pair.rank <= bound}
    return [low, {row: pair for row, pair in rows.items() if row not in low}]


def _select_rows(rows: dict[int, RowSlot], count: int, device: torch.device) -> RowSelection:
    slots, ranks, scalings = zip(*rows.values(), strict=True)
    return RowSelection(
        rows=None if len(rows) == count else _as_index(list(rows), device),
        slots=_as_index(slots, device),
        rank=max(ranks),
        scaling=scalings[0] if len(set(scalings)) == 1 else torch.tensor(scalings, device=device).view(-1, 1, 1),
    )


def _as_index(numbers: Sequence[int], device: torch.device) -> slice | Tensor:
    """Numbers as an index: a range where they follow one another."""
    if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[-1] + 1)
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
