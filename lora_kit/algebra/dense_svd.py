"""The leading singular triplets of a dense matrix: what extracting and the pruning methods need."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from lora_kit.algebra.low_rank import LowRankUpdate, ThinSvd, find_smallest_rank

_EXACT_SVD_SIZE: Final = 512
"""Up to this many rows or columns a whole SVD costs little."""
_OVERSAMPLING: Final = 16
"""Columns of a sketch beyond twice the rank."""
_POWER_ITERATIONS: Final = 6
_ROWS_PER_BLOCK: Final = 512
"""Rows that are copied at once."""


def approximate_low_rank(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> LowRankUpdate:
    """The nearest update of a rank, or of the smallest rank that keeps a share of `‖matrix‖²`.

    A large matrix goes through a randomised range finder with power iterations (Halko, Martinsson, Tropp 2011, arXiv
    0909.4061): products with a few columns instead of a whole SVD. The same matrix gives the same result.

    Args:
        matrix: float32 (out, in). rank, energy: one of the two.
    """
    total, most = compute_squared_norm(matrix), min(matrix.shape)
    if energy is None:
        assert rank is not None
        rank = min(rank, most)
        return _sketch_svd(matrix, 2 * rank + _OVERSAMPLING).best(rank)
    columns = 2 * _OVERSAMPLING
    while True:
        found = _sketch_svd(matrix, columns)
        squares = found.s.square()
        # The last columns of a sketch are less than the matrix's own, so that reaching the share is enough.
        if float(squares.sum()) >= energy * total or columns >= most:
            return found.best(find_smallest_rank(squares, energy * total))
        columns *= 2


def compute_residual_norm(matrix: Tensor, kept: LowRankUpdate) -> float:
    """`‖matrix - kept‖` in the Frobenius norm."""
    b, a = kept.b.float(), kept.a.float()
    return math.sqrt(
        math.fsum(
            compute_squared_norm(part - rows @ a)
            for part, rows in zip(_split_row_blocks(matrix), _split_row_blocks(b), strict=True)
        )
    )


def compute_squared_norm(matrix: Tensor) -> float:
    """`‖matrix‖²`, summed in double precision some rows at a time."""
    return math.fsum(float(part.double().square().sum()) for part in _split_row_blocks(matrix))


def _split_row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(_ROWS_PER_BLOCK)


def _sketch_svd(matrix: Tensor, columns: int) -> ThinSvd:
    """Leading singular triplets of a matrix, as many as there are columns in the sketch, or all of them."""
    if min(matrix.shape) <= max(_EXACT_SVD_SIZE, columns):
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return ThinSvd(u, s, vh)
    generator = torch.Generator().manual_seed(0)
    q = _orthonormalize(matrix @ torch.randn(matrix.shape[1], columns, generator=generator))
    for _ in range(_POWER_ITERATIONS):
        q = _orthonormalize(matrix @ _orthonormalize(matrix.T @ q))
    return LowRankUpdate(q.double(), (q.T @ matrix).double()).svd()


def _orthonormalize(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q
