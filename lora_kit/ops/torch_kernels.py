"""The products of a low-rank update in plain torch: the reference for other kernels, and used without them.

No autograd in here: `ops.lora` calls these from its autograd functions. Arguments may have any strides. Slot 0 is the
base: its stacked weights and its scaling are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Add y += scaling · (x Aᵀ) Bᵀ in place.

    Args:
        y: (n, out), overwritten.
        x: (n, in) in the dtype of y.
        a: (r, in), of any floating-point dtype; the products are computed in that of y.
        b: (out, r), likewise.
        scaling: a number.

    Returns:
        x Aᵀ, (n, r) in the dtype of y.
    """
    if a.dtype != y.dtype:
        a = a.to(y.dtype)
    if b.dtype != y.dtype:
        b = b.to(y.dtype)
    h = torch.mm(x, a.t())
    y.addmm_(h, b.t(), alpha=scaling)
    return h


def add_rows_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """Add yᵢ += scaling[kᵢ] · (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ in place for every row i, with k = slots: a shrink and an expand.

    Args:
        y: (R, T, out), overwritten.
        x: (R, T, in) in the dtype of y.
        a: (S, r, in), of any floating-point dtype.
        b: (S, out, r), likewise.
        scaling: (S,) fp32.
        slots: (R,) int64.

    Returns:
        xᵢ A[kᵢ]ᵀ, (R, T, r) in the dtype of y.
    """
    h = shrink_rows(x, a, slots)
    expand_rows_(y, h, b, scaling, slots)
    return h


def shrink_rows(x: Tensor, a: Tensor, slots: Tensor) -> Tensor:
    """Return xᵢ A[kᵢ]ᵀ for every row i, with k = slots.

    Args:
        x: (R, T, in).
        a: (S, r, in), of any floating-point dtype.
        slots: (R,) int64.

    Returns:
        (R, T, r) in the dtype of x; zeros where the slot is 0.
    """
    return torch.bmm(x, a.index_select(0, slots).to(x.dtype).mT)


def expand_rows_(y: Tensor, h: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> None:
    """Add yᵢ += scaling[kᵢ] · hᵢ B[kᵢ]ᵀ in place for every row i, with k = slots.

    Args:
        y: (R, T, out), overwritten.
        h: (R, T, r) in the dtype of y.
        b: (S, out, r), of any floating-point dtype.
        scaling: (S,) fp32.
        slots: (R,) int64.
    """
    scaled = torch.empty_like(h)
    torch.mul(h, scaling.index_select(0, slots).view(-1, 1, 1), out=scaled)  # multiplied in fp32, rounded once
    y.baddbmm_(scaled, b.index_select(0, slots).to(y.dtype).mT)
