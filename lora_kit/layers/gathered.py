"""The pairs of a batch's rows, taken out of a layer's slabs once and used by every forward until the routing changes.

Without gradients and without kernels that read slabs by slot, a forward would gather each row's A and B again for
every token that is generated, which costs more than the products do. Rows that use the base are left out, and rows of
much lower rank than the others are a part of their own, so nobody pays for what others use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


Pair = tuple[int, float] | None
"""Rank and scaling of what a row uses; None for the base."""


def gathered(a: Tensor, b: Tensor, used: Sequence[int], pairs: Sequence[Pair], dtype: torch.dtype) -> list[Part]:
    """The parts of a batch, at most two.

    Args:
        a: (S, r, in). b: (S, out, r). Slabs, in memory the rank before the features.
        used: the slot of each row. pairs: what each row has there.
        dtype: of the activations.
    """
    held = [pair for pair in pairs if pair is not None]
    active = [row for row, pair in enumerate(pairs) if pair is not None]
    return [_part(a, b, used, rows, pairs, dtype) for rows in _by_rank(active, [pair[0] for pair in held])]


def _by_rank(rows: list[int], ranks: list[int]) -> list[list[int]]:
    """Rows in one part, or in two where paying the highest rank for all of them would more than double the work."""
    if not rows:
        return []
    high = max(ranks)
    if high * len(ranks) <= 2 * sum(ranks):
        return [rows]
    ranked = list(zip(rows, ranks, strict=True))
    # The split that costs least: each part pays its own highest rank.
    bound = min(set(ranks) - {high}, key=lambda low: sum(low if rank <= low else high for rank in ranks))
    return [[row for row, rank in ranked if rank <= bound], [row for row, rank in ranked if rank > bound]]


def _part(
    a: Tensor, b: Tensor, used: Sequence[int], rows: Sequence[int], pairs: Sequence[Any], dtype: torch.dtype
) -> Part:
    slots, held = [used[row] for row in rows], [pairs[row] for row in rows]
    scalings = {scaling for _, scaling in held}
    return Part(
        _rows(rows, len(used), a.device),
        _taken(a, slots, max(rank for rank, _ in held), dtype).mT,
        _taken(b.mT, slots, max(rank for rank, _ in held), dtype),
        scalings.pop()
        if len(scalings) == 1
        else torch.tensor([scaling for _, scaling in held], device=a.device).view(-1, 1, 1),
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
