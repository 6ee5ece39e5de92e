"""Folding updates into a weight by blocks of rows: accumulated in fp32, rounded once.

    W' = round(W + Σ s B A)          of a DoRA, merged alone:  W' = round(m / |W + s B A| · (W + s B A))

A block is small enough to stay in a core's cache. A product of at least 16 rows has the same bits as those rows of the
whole product, so the result is bitwise that of a merge in memory.
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
"""Values of a block: 1 MB in fp32."""
_MIN_BLOCK_ROWS: Final = 16
"""Rows of a block, at least: with fewer the BLAS takes another path, which gives other bits."""

ReserveMemory = Callable[[int, torch.dtype], Tensor]
"""Returns memory for so many values of a dtype, into which a block is written."""


def split_rows(rows: int, columns: int, *, multiple: int = 1) -> Iterator[slice]:
    """Yield the blocks of rows of a weight; a short rest belongs to the last one.

    Args:
        rows: of the weight.
        columns: of the weight.
        multiple: the length of every block but the last is a multiple of it.
    """
    least = math.lcm(_MIN_BLOCK_ROWS, multiple)
    step = max(least, _BLOCK_ELEMENTS // max(columns, 1) // least * least)
    starts = list(range(0, rows, step))
    if len(starts) > 1 and rows - starts[-1] < _MIN_BLOCK_ROWS:
        starts.pop()
    yield from map(slice, starts, [*starts[1:], rows])


class TensorFold:
    """The fold of one planned tensor."""

    def __init__(self, entry: PlannedTensor) -> None:
        self.entry = entry
        self._tally = RetentionTally(entry.path, entry.dtype)

    @torch.no_grad()
    def write_into(self, reserve: ReserveMemory) -> Iterator[int]:
        """Write the merged weight block by block, each into memory that is reserved for it; yield the bytes of each.

        Raises:
            MergeError: it is not finite.
        """
        for _, target in self._iterate_sums():
            merged = reserve(target.numel(), self.entry.dtype).view(target.shape).copy_(target)
            self._tally.add_lost(target.sub_(merged))
            yield merged.nbytes

    @torch.no_grad()
    def requantize(self) -> QuantizedWeight:
        """Return the merged weight, quantized as the base's is.

        Raises:
            MergeError: it is not finite.
        """
        source = self.entry.source
        assert isinstance(source, QuantizedWeight)
        merged = source.pack(target for _, target in self._iterate_sums())
        # The sums are computed twice: what a value becomes is known only once all scales of the weight are.
        self._tally = RetentionTally(self.entry.path, self.entry.dtype)
        for rows, target in self._iterate_sums():
            self._tally.add_lost(target.sub_(merged[rows]))
        return merged

    def _iterate_sums(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of rows with weight + delta there, fp32; each is valid until the next one."""
        for matrix in self.entry.matrices:
            yield from self._iterate_matrix_sums(matrix)

    def _iterate_matrix_sums(self, entry: PlannedTensor) -> Iterator[tuple[slice, Tensor]]:
        source = entry.source
        dtype, columns = torch.promote_types(source.dtype, torch.float32), _compute_column_scale(entry)
        blocks = list(split_rows(*source.shape, multiple=source.step if isinstance(source, QuantizedWeight) else 1))
        # The same memory for every block: touching new pages takes longer than the sums.
        longest = max(rows.stop - rows.start for rows in blocks)
        exacts, targets = (torch.empty(longest, source.shape[1], dtype=dtype) for _ in range(2))
        self._tally.delta += 0.0 if columns is not None else _sum_squares_of_delta(entry.updates)
        for rows in blocks:
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
    """Compute Σ s B A for some rows of a weight, in the layout it is stored in.

    Args:
        entry: the weight and its updates.
        rows: of the weight.
        into: (rows, columns) for the result.

    Returns:
        `into`.
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
    """Return s B A for some rows, fp32."""
    a, b, scaling = update.weights.a, update.weights.b, update.scaling
    left, right = (a[:, rows].float().T, b.float().T) if transposed else (b[rows].float(), a.float())
    if math.frexp(abs(scaling))[0] == 0.5:
        return torch.mm(
            left * scaling, right, out=into
        )  # a power of two gives the same bits, with fewer values to scale
    return torch.mm(left, right, out=into).mul_(scaling)


def _compute_column_scale(entry: PlannedTensor) -> Tensor | None:
    """Return c = m / |W + s B A| of a DoRA, (out,), computed by blocks of outputs; None for others.

    A and B are rounded to the base's dtype, as in the use of the adapter, unless the result has a finer one.
    """
    scaling, weights, source = entry.updates[0].scaling, entry.updates[0].weights, entry.source
    if weights.magnitude is None:
        return None
    weight = source.T if entry.transposed and isinstance(source, Tensor) else source
    parts = []
    for rows in split_rows(*weight.shape, multiple=source.step if isinstance(source, QuantizedWeight) else 1):
        block = weight[rows]
        block = block.to(torch.promote_types(block.dtype, entry.dtype))
        parts.append(dora_scale(block, weights.a, weights.b[rows], scaling, weights.magnitude[rows]))
    return torch.cat(parts)


def _sum_squares_of_delta(updates: Sequence[WeightUpdate]) -> float:
    """Return |Σ s B A|² from r × r matrices: the sum of (Bᵀ B) ∘ (A Aᵀ)."""
    a = torch.cat([update.weights.a.double() for update in updates])
    b = torch.cat([update.weights.b.double() * update.scaling for update in updates], dim=1)
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
