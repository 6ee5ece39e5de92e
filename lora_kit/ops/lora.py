"""Adding a low-rank update to the output of a frozen layer.

    lora_add       y + s · (x Aᵀ) Bᵀ                        one pair for the whole batch
    lora_add_rows  yᵢ + s[kᵢ] · (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ          one pair per row, picked from slabs by slot

(Hu et al. 2021, arXiv 2106.09685.) Both write into `y` where that is safe, so the base's output is never copied;
compute in the dtype of `y`, so that fp32 factors on a bf16 base, and autocast, cost a cast of the small factors and
none of x; and keep x and the rank-r product x·Aᵀ for the backward, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y + scaling · (x Aᵀ) Bᵀ.

    Args:
        y: (..., out), the base's output; overwritten with the result unless it is a view.
        x: (..., in), the base's input; leading sizes as in y.
        a: (r, in). b: (out, r). Any floating dtype: they are cast to that of y.
        scaling: a number, usually alpha / r.

    Returns:
        (..., out) in the dtype of y. Gradients go to y, x, a and b, those of a and b in their own dtypes.
    """
    if torch.compiler.is_compiling():
        # The compiler fuses and schedules by itself; it is given the plain equation.
        h = x.to(y.dtype) @ a.to(y.dtype).mT
        return torch.add(y, h @ b.to(y.dtype).mT, alpha=scaling)
    return _without_autocast(_LoraAdd, y, x, a, b, scaling)


def lora_add_rows(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """yᵢ + scaling[kᵢ] · (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ for every row i, with k = slots.

    The number of operations does not depend on how many different slots are named.

    Args:
        y: (n, ..., out), the base's output; overwritten with the result unless it is a view.
        x: (n, ..., in); n is a multiple of R, and each run of n/R entries belongs to one row (beams, flattened tokens).
        a: (S, r, in). b: (S, out, r). scaling: (S,).
        slots: (R,) int64, each from 0 to S - 1.

    Returns:
        (n, ..., out) in the dtype of y. Gradients go to y, x, a and b.
    """
    if torch.compiler.is_compiling():
        rows = slots.shape[0]
        h = torch.bmm(x.to(y.dtype).reshape(rows, -1, x.shape[-1]), a[slots].to(y.dtype).mT)
        h = (h * scaling[slots].view(-1, 1, 1)).to(y.dtype)
        return y + torch.bmm(h, b[slots].to(y.dtype).mT).view(y.shape)
    return _without_autocast(_LoraAddRows, y, x, a, b, scaling, slots)


def lora_add_embedding(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y + scaling · Aᵀ[ids] Bᵀ: `lora_add` where the layer is a look-up, so that x is one-hot and is never made.

    Args:
        y: (..., dim), the looked-up embeddings. ids: (...) int64.
        a: (r, entries). b: (dim, r).

    Returns:
        (..., dim) in the dtype of y; a new tensor.
    """
    h = torch.nn.functional.embedding(ids, a.mT).to(y.dtype)
    return torch.add(y, h @ b.to(y.dtype).mT, alpha=scaling)


def lora_add_embedding_rows(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """`lora_add_rows` for a look-up.

    Args:
        y: (n, ..., dim). ids: (n, ...) int64; n is a multiple of R.
        a: (S, r, entries). b: (S, dim, r). scaling: (S,). slots: (R,) int64.

    Returns:
        (n, ..., dim) in the dtype of y; a new tensor.
    """
    rows = slots.shape[0]
    slot_of = slots.repeat_interleave(ids.numel() // rows)
    h = a[slot_of, :, ids.reshape(-1)] * scaling[slot_of].unsqueeze(-1)  # (tokens, r)
    h = h.to(y.dtype).view(rows, -1, a.shape[1])
    return y + torch.bmm(h, b[slots].to(y.dtype).mT).view(y.shape)


def _without_autocast(function: type[torch.autograd.Function], y: Tensor, *args: Any) -> Tensor:
    """Apply with autocast off: the dtype was settled by the base layer, whose output y is."""
    if torch.is_autocast_enabled(y.device.type):
        with torch.autocast(y.device.type, enabled=False):
            return function.apply(y, *args)
    return function.apply(y, *args)


def _writable(ctx: Any, y: Tensor) -> Tensor:
    """y itself, marked as overwritten, or a copy where y is a view: its memory is somebody else's tensor."""
    if y._is_view() or not y.is_contiguous() or (y.is_leaf and y.requires_grad):
        return y.clone(memory_format=torch.contiguous_format)
    ctx.mark_dirty(y)
    return y


class _LoraAdd(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ.

    With g = s · dY B (tokens, r):  dX = g A,  dA = gᵀ x,  dB = s · dYᵀ (x Aᵀ),  dY passes through.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.x_dtype, ctx.scaling = x.dtype, scaling
        x = x.to(y.dtype)
        h = x.reshape(-1, x.shape[-1]) @ a.to(y.dtype).mT  # (tokens, r)
        ctx.save_for_backward(x, a, b, h)
        y = _writable(ctx, y)
        y.view(-1, y.shape[-1]).addmm_(h, b.to(y.dtype).mT, alpha=scaling)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, h = ctx.saved_tensors
        d = dy.reshape(-1, dy.shape[-1])
        g = (d @ b.to(d.dtype)).mul_(ctx.scaling)  # (tokens, r)
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        dx = (g @ a.to(d.dtype)).view(x.shape).to(ctx.x_dtype) if needs_x else None
        da = (g.mT @ x.reshape(-1, x.shape[-1])).to(a.dtype) if needs_a else None
        db = (d.mT @ h).mul_(ctx.scaling).to(b.dtype) if needs_b else None
        return dy, dx, da, db, None


class _LoraAddRows(torch.autograd.Function):
    """yᵢ + s[kᵢ] (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ; the gradients of `_LoraAdd` row by row, those of A and B summed by slot."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
        ctx.x_dtype = x.dtype
        x, rows = x.to(y.dtype), slots.shape[0]
        h = torch.bmm(x.reshape(rows, -1, x.shape[-1]), a.index_select(0, slots).to(y.dtype).mT)  # (R, tokens, r)
        h.mul_(scaling.index_select(0, slots).view(-1, 1, 1))
        ctx.save_for_backward(x, a, b, scaling, slots, h)
        y = _writable(ctx, y)
        y.view(rows, -1, y.shape[-1]).baddbmm_(h, b.index_select(0, slots).to(y.dtype).mT)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, scaling, slots, h = ctx.saved_tensors
        rows = slots.shape[0]
        d = dy.reshape(rows, -1, dy.shape[-1])
        g = torch.bmm(d, b.index_select(0, slots).to(d.dtype))  # (R, tokens, r)
        g.mul_(scaling.index_select(0, slots).view(-1, 1, 1))
        _, needs_x, needs_a, needs_b, _, _ = ctx.needs_input_grad
        dx = torch.bmm(g, a.index_select(0, slots).to(d.dtype)).view(x.shape).to(ctx.x_dtype) if needs_x else None
        da = _sum_by_slot(torch.bmm(g.mT, x.reshape(rows, -1, x.shape[-1])), slots, like=a) if needs_a else None
        db = _sum_by_slot(torch.bmm(d.mT, h), slots, like=b) if needs_b else None
        return dy, dx, da, db, None, None


def _sum_by_slot(rows: Tensor, slots: Tensor, *, like: Tensor) -> Tensor:
    """(R, p, q) summed into (S, p, q) by slot, in the dtype of `like`."""
    return torch.zeros_like(like).index_add_(0, slots, rows.to(like.dtype))
