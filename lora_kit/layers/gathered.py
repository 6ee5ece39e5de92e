"""The pairs of a batch's rows, taken out of a layer's slabs once and used by every forward until the routing changes.

Without gradients and without kernels that read slabs by slot, a forward would gather each row's A and B again for
every token that is generated, which costs more than the products do. Rows that use the base are left out, and rows of
much lower rank than the others are a part of their own, so nobody pays for what others use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
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


def gathered(
    a: Tensor, b: Tensor, used: Sequence[int], pairs: Mapping[int, tuple[int, float]], dtype: torch.dtype
) -> list[Part]:
    """The parts of a batch, at most two.

    Args:
        a: (S, r, in). b: (S, out, r). Slabs.
        used: the slot of each row.
        pairs: rank and scaling of each slot that holds a pair; rows of other slots use the base.
        dtype: of the activations.
    """
    active = [row for row, slot in enumerate(used) if slot in pairs]
    return [_part(a, b, used, rows, pairs, dtype) for rows in _by_rank(active, [pairs[used[row]][0] for row in active])]


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
    a: Tensor,
    b: Tensor,
    used: Sequence[int],
    rows: list[int],
    pairs: Mapping[int, tuple[int, float]],
    dtype: torch.dtype,
) -> Part:
    slots = [used[row] for row in rows]
    rank = max(pairs[slot][0] for slot in slots)
    scalings = [pairs[slot][1] for slot in slots]
    # Slots that follow one another are read where they are. Both slabs have the rank before the features in memory.
    taken = slice(slots[0], slots[-1] + 1)
    index = taken if _in_a_row(slots) else torch.tensor(slots, device=a.device)
    return Part(
        rows=_rows(rows, len(used), a.device),
        a=a[:, :rank][index].to(dtype).mT,
        b=b.mT[:, :rank][index].to(dtype),
        scaling=scalings[0] if len(set(scalings)) == 1 else torch.tensor(scalings, device=a.device).view(-1, 1, 1),
    )


def _in_a_row(numbers: Sequence[int]) -> bool:
    return list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))


def _rows(rows: list[int], count: int, device: torch.device) -> slice | Tensor | None:
    if len(rows) == count:
        return None
    if _in_a_row(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
