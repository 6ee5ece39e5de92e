"""The leading singular triplets of a dense matrix, which `extract` and the pruning methods of `combine` need."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from lora_kit.algebra.low_rank import LowRankUpdate, ThinSvd, find_smallest_rank

_EXACT_SVD_SIZE: Final = 512
"""Up to this many rows or columns, the whole SVD is taken: it costs little."""
_OVERSAMPLING: Final = 16
"""Columns of a sketch beyond twice the rank: they make the leading triplets exact."""
_POWER_ITERATIONS: Final = 6
_ROWS_PER_BLOCK: Final = 512
"""Rows that are converted to double precision at once."""


def approximate_low_rank(matrix: Tensor, *, rank: int | None = None, energy: float | None = None) -> LowRankUpdate:
    """Return the nearest update of a rank, or of the smallest rank that keeps a share of `‖matrix‖²`.

    A large matrix goes through a randomized range finder with power iterations (Halko, Martinsson, Tropp 2011, arXiv
    0909.4061): products with a few columns instead of a whole SVD. The same matrix gives the same result.

    Args:
        matrix: float32 (out, in).
        rank: at most; or None.
        energy: the share that is kept; used where no rank is given.
    """
    total, most = compute_squared_norm(matrix), min(matrix.shape)
    if energy is None:
        assert rank is not None
        rank = min(rank, most)
        return _sketch_svd(matrix, 2 * rank + _OVERSAMPLING).best(rank)
    columns = 2 * _OVERSAMPLING
    while True:
        svd = _sketch_svd(matrix, columns)
        squares = svd.s.square()
        # A sketch underestimates the last singular values: once they reach the share, the matrix's own do too.
        if float(squares.sum()) >= energy * total or columns >= most:
            return svd.best(find_smallest_rank(squares, energy * total))
        columns *= 2


def compute_residual_norm(matrix: Tensor, update: LowRankUpdate) -> float:
    """Return `‖matrix - update‖` in the Frobenius norm."""
    b, a = update.b.float(), update.a.float()
    return math.sqrt(
        math.fsum(
            compute_squared_norm(part - rows @ a)
            for part, rows in zip(_split_row_blocks(matrix), _split_row_blocks(b), strict=True)
        )
    )


def compute_squared_norm(matrix: Tensor) -> float:
    """Return `‖matrix‖²`, summed in double precision, a block of rows at a time."""
    return math.fsum(float(part.double().square().sum()) for part in _split_row_blocks(matrix))


def _split_row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(_ROWS_PER_BLOCK)


def _sketch_svd(matrix: Tensor, columns: int) -> ThinSvd:
    """Return the leading singular triplets of a matrix, as many as the sketch has columns; all of a small matrix."""
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
