"""Folding low-rank updates into one weight by blocks of rows: accumulated in fp32, rounded once.

    W' = round(W + Σ s B A)          of a DoRA, with one pair:  W' = round(m / |W + s B A| · (W + s B A))

A block is small enough to stay in a core's cache, and a product of 16 rows and more has the bits it has in the whole
product: what comes out is what a merge in memory gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from lora_kit.layers.fold import Retention, RetentionTally, sum_squares
from lora_kit.merging.checkpoint.bnb_weights import QuantizedWeight
from lora_kit.merging.planned_tensors import PlannedTensor, WeightUpdate
from lora_kit.ops.dora import dora_scale

_BLOCK_ELEMENTS: Final = 2**18
"""Of a block; one MB of fp32."""
_MIN_BLOCK_ROWS: Final = 16
"""Rows of a block. Products of fewer go another way through the BLAS, and end in other bits."""


def split_rows(rows: int, columns: int, *, multiple: int = 1) -> Iterator[slice]:
    """Rows in blocks; a short rest is part of the last one.

    Args:
        multiple: of which all but the last have a multiple.
    """
    least = math.lcm(_MIN_BLOCK_ROWS, multiple)
    step = max(least, _BLOCK_ELEMENTS // max(columns, 1) // least * least)
    starts = list(range(0, rows, step))
    if len(starts) > 1 and rows - starts[-1] < _MIN_BLOCK_ROWS:
        starts.pop()
    yield from map(slice, starts, [*starts[1:], rows])


class TensorFold:
    """The fold of one tensor, and what becomes of its delta."""

    def __init__(self, entry: PlannedTensor) -> None:
        self.entry = entry
        self._tally = RetentionTally(entry.path, entry.dtype)

    @torch.no_grad()
    def into(self, room: Callable[[int, torch.dtype], Tensor]) -> Iterator[int]:
        """Put the merged rows, block by block, into memory that is asked for; their bytes each time.

        Raises:
            MergeError: they are not finite.
        """
        for _, target in self._iterate_sums():
            merged = room(target.numel(), self.entry.dtype).view(target.shape).copy_(target)
            self._tally.add_lost(target.sub_(merged))
            yield merged.nbytes

    @torch.no_grad()
    def packed(self) -> QuantizedWeight:
        """The merged weight, quantised as the base's is.

        Raises:
            MergeError: it is not finite.
        """
        source = self.entry.source
        assert isinstance(source, QuantizedWeight)
        again = source.pack(target for _, target in self._iterate_sums())
        # A second time, since what is left of a number is known once all scales of the weight are.
        self._tally = RetentionTally(self.entry.path, self.entry.dtype)
        for rows, target in self._iterate_sums():
            self._tally.add_lost(target.sub_(again[rows]))
        return again

    def _iterate_sums(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and there the sum of weight and delta; good until the next ones are taken."""
        for matrix in self.entry.matrices:
            yield from self._iterate_matrix_sums(matrix)

    def _iterate_matrix_sums(self, entry: PlannedTensor) -> Iterator[tuple[slice, Tensor]]:
        source = entry.source
        dtype, columns = torch.promote_types(source.dtype, torch.float32), _compute_column_scale(entry)
        parts = list(split_rows(*source.shape, multiple=source.step if isinstance(source, QuantizedWeight) else 1))
        # Memory that is used again: touching new pages would take longer than the sums.
        most = max(rows.stop - rows.start for rows in parts)
        exacts, targets = (torch.empty(most, source.shape[1], dtype=dtype) for _ in range(2))
        self._tally.delta += 0.0 if columns is not None else _sum_squares_of_delta(entry.updates)
        for rows in parts:
            count = rows.stop - rows.start
            exact = exacts[:count].copy_(source[rows])
            self._tally.weight += sum_squares(exact)
            target = sum_updates_into(entry, rows, into=targets[:count]).add_(exact)
            if columns is not None:
                target *= columns if entry.transposed else columns[rows].unsqueeze(1)
                self._tally.delta += sum_squares(target - exact)
            yield rows, target

    @property
    def retention(self) -> Retention:
        """What survived, once every block was written."""
        return self._tally.compute_retention()


def sum_updates_into(entry: PlannedTensor, rows: slice, *, into: Tensor) -> Tensor:
    """Σ s B A for some rows of a weight, the way round it is kept.

    Args:
        into: (rows, columns), where it is put.
    """
    first, *others = entry.updates
    if into.dtype == torch.float32:
        _multiply_factors(first, rows, transposed=entry.transposed, into=into)
    else:
        into.copy_(_multiply_factors(first, rows, transposed=entry.transposed))
    for other in others:
        into += _multiply_factors(other, rows, transposed=entry.transposed)
    return into


def _multiply_factors(update: WeightUpdate, rows: slice, *, transposed: bool, into: Tensor | None = None) -> Tensor:
    """s B A in fp32."""
    a, b, scaling = update.pair.a, update.pair.b, update.scaling
    left, right = (a[:, rows].float().T, b.float().T) if transposed else (b[rows].float(), a.float())
    if math.frexp(abs(scaling))[0] == 0.5:
        return torch.mm(left * scaling, right, out=into)  # a power of two: the same bits, with fewer numbers to scale
    return torch.mm(left, right, out=into).mul_(scaling)


def _compute_column_scale(entry: PlannedTensor) -> Tensor | None:
    """c = m / |W + s B A| of a DoRA, (out,); None for others. A block of outputs at a time."""
    update = entry.updates[0]
    pair = update.pair
    if pair.magnitude is None:
        return None
    source = entry.source
    weight = source.T if entry.transposed and isinstance(source, Tensor) else source
    parts = [
        dora_scale(weight[rows], pair.a, pair.b[rows], update.scaling, pair.magnitude[rows])
        for rows in split_rows(*weight.shape, multiple=source.step if isinstance(source, QuantizedWeight) else 1)
    ]
    return torch.cat(parts)


def _sum_squares_of_delta(updates: Sequence[WeightUpdate]) -> float:
    """|Σ s B A|², by way of r x r matrices: the sum of (Bᵀ B) ∘ (A Aᵀ)."""
    a = torch.cat([update.pair.a.double() for update in updates])
    b = torch.cat([update.pair.b.double() * update.scaling for update in updates], dim=1)
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
