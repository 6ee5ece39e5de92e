"""The pairs of a batch's rows, taken out of a layer's slabs once and used by every forward until the routing changes.

Without gradients and without kernels that read slabs by slot, a forward would gather each row's A and B again for
every token that is generated, which costs more than the products do. Rows that use the base are left out, and rows of
much lower rank than the others are a part of their own, so nobody pays for what others use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """What one row of a batch uses."""

    slot: int
    rank: int
    scaling: float


@dataclass
class Part:
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
        if isinstance(self.rows, Tensor):
            y.index_add_(0, self.rows, self._update(x.index_select(0, self.rows)))
            return
        if self.rows is not None:
            y, x = y[self.rows], x[self.rows]
        h = torch.bmm(x, self.a)
        if isinstance(self.scaling, Tensor):
            y.baddbmm_((h * self.scaling).to(h.dtype), self.b)
        else:
            y.baddbmm_(h, self.b, alpha=self.scaling)

    def _update(self, x: Tensor) -> Tensor:
        return torch.bmm((torch.bmm(x, self.a) * self.scaling).to(x.dtype), self.b)


def gathered(a: Tensor, b: Tensor, pairs: Sequence[Pair | None], dtype: torch.dtype) -> list[Part]:
    """The parts of a batch, at most two.

    Args:
        a: (S, r, in). b: (S, out, r). Slabs, in memory the rank before the features.
        pairs: of each row; None for the base.
        dtype: of the activations.
    """
    held = {row: pair for row, pair in enumerate(pairs) if pair is not None}
    return [_part(a, b, rows, len(pairs), dtype) for rows in _by_rank(held)]


def _by_rank(rows: dict[int, Pair]) -> list[dict[int, Pair]]:
    """Rows in one part, or in two where paying the highest rank for all of them would more than double the work."""
    ranks = [pair.rank for pair in rows.values()]
    if not rows or max(ranks) * len(ranks) <= 2 * sum(ranks):
        return [rows] if rows else []
    high = max(ranks)
    # The split that costs least: each part pays its own highest rank.
    bound = min(set(ranks) - {high}, key=lambda low: sum(low if rank <= low else high for rank in ranks))
    low = {row: pair for row, pair in rows.items() if pair.rank <= bound}
    return [low, {row: pair for row, pair in rows.items() if row not in low}]


def _part(a: Tensor, b: Tensor, rows: dict[int, Pair], count: int, dtype: torch.dtype) -> Part:
    slots, ranks, scalings = zip(*rows.values(), strict=True)
    one = len(set(scalings)) == 1
    return Part(
        rows=_rows(list(rows), count, a.device),
        a=_taken(a, slots, max(ranks), dtype).mT,
        b=_taken(b.mT, slots, max(ranks), dtype),
        scaling=scalings[0] if one else torch.tensor(scalings, device=a.device).view(-1, 1, 1),
    )


def _taken(slab: Tensor, slots: Sequence[int], rank: int, dtype: torch.dtype) -> Tensor:
    """(R', rank, features) of a slab (S, r, features): where it lies if the slots follow one another, else a copy."""
    if rank < slab.shape[1]:
        slab = slab[:, :rank]
    if _in_a_row(slots):
        taken = slab.narrow(0, slots[0], len(slots))
    else:
        taken = slab.index_select(0, torch.tensor(slots, device=slab.device))
    return taken if taken.dtype == dtype else taken.to(dtype)


def _in_a_row(numbers: Sequence[int]) -> bool:
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def _rows(rows: Sequence[int], count: int, device: torch.device) -> slice | Tensor | None:
    if len(rows) == count:
        return None
    if _in_a_row(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
