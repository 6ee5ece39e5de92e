"""The leading singular triplets of a dense matrix: what extracting and the pruning methods need."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from lora_kit.algebra.low_rank import Factors, Spectrum, enough

_EXACT: Final = 512
"""Up to this many rows or columns a whole SVD costs little."""
_MORE: Final = 16
"""Columns of a sketch beyond twice the rank."""
_PASSES: Final = 6
_ROWS: Final = 512
"""Rows that are copied at once."""


def leading(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> Factors:
    """The nearest update of a rank, or of the smallest rank that keeps a share of `‖matrix‖²`.

    A large matrix goes through a randomised range finder with power iterations (Halko, Martinsson, Tropp 2011, arXiv
    0909.4061): products with a few columns instead of a whole SVD. The same matrix gives the same result.

    Args:
        matrix: float32 (out, in). rank, energy: one of the two.
    """
    total, most = squared(matrix), min(matrix.shape)
    if energy is None:
        assert rank is not None
        rank = min(rank, most)
        return _sketched(matrix, 2 * rank + _MORE).best(rank)
    columns = 2 * _MORE
    while True:
        found = _sketched(matrix, columns)
        squares = found.s.square()
        # The last columns of a sketch are less than the matrix's own, so that reaching the share is enough.
        if float(squares.sum()) >= energy * total or columns >= most:
            return found.best(enough(squares, energy * total))
        columns *= 2


def missed(matrix: Tensor, kept: Factors) -> float:
    """`‖matrix - kept‖` in the Frobenius norm."""
    b, a = kept.b.float(), kept.a.float()
    return math.sqrt(
        math.fsum(squared(part - rows @ a) for part, rows in zip(_blocks(matrix), _blocks(b), strict=True))
    )


def squared(matrix: Tensor) -> float:
    """`‖matrix‖²`, summed in double precision some rows at a time."""
    return math.fsum(float(part.double().square().sum()) for part in _blocks(matrix))


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(_ROWS)


def _sketched(matrix: Tensor, columns: int) -> Spectrum:
    """Leading singular triplets of a matrix, as many as there are columns in the sketch, or all of them."""
    if min(matrix.shape) <= max(_EXACT, columns):
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return Spectrum(u, s, vh)
    generator = torch.Generator().manual_seed(0)
    q = _basis(matrix @ torch.randn(matrix.shape[1], columns, generator=generator))
    for _ in range(_PASSES):
        q = _basis(matrix @ _basis(matrix.T @ q))
    return Factors(q.double(), (q.T @ matrix).double()).svd()


def _basis(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q
