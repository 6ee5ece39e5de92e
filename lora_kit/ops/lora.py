"""The low-rank update of a frozen layer: y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ.

    lora_linear    x Wᵀ + bias + s · (x Aᵀ) Bᵀ              one A and B for the whole batch, the base computed here too
    lora_add       y + s · (x Aᵀ) Bᵀ                        the same for a base that is a black box with output y
    lora_add_rows  yᵢ + s[kᵢ] · (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ          one A and B per row, from stacked weights by slot

(Hu et al. 2021, arXiv 2106.09685.) Each is three products: the base's, x Aᵀ, and one added in place to the base's
output. They compute in the dtype of y: with fp32 factors on a bf16 base, and under autocast, only the small factors are
cast, and x no more than for the base. For the backward they keep x and the rank-r product, nothing else. Where nothing
needs a gradient, no autograd function is entered. `dispatch.get_kernels` chooses what computes the products.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.nn import functional

from lora_kit.ops import dispatch, torch_kernels
from lora_kit.ops.lora_functions import (
    LoraAddFunction,
    LoraAddRowsFunction,
    LoraLinearFunction,
    can_overwrite,
    cast_once,
    copy_contiguous,
)


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, *, dropout: float = 0.0
) -> Tensor:
    """Return x Wᵀ + bias + scaling · (drop(x) Aᵀ) Bᵀ.

    The base is computed here, so that in the backward the update's part of dX is added to the base's in place.

    Args:
        x: (..., in).
        weight: W (out, in), frozen, in any memory order.
        bias: (out,), frozen, or None.
        a: (r, in), of any floating-point dtype; cast to that of the output.
        b: (out, r), likewise.
        scaling: a number, usually alpha / r.
        dropout: probability of dropping an element of x on its way to A.

    Returns:
        (..., out), of the dtype that a linear layer would return. Gradients go to x, a and b.
    """
    if torch.compiler.is_compiling():
        return _add_by_equation(functional.linear(x, weight, bias), x, a, b, scaling, dropout)
    dtype = autocast_dtype_of(x)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        return functional.linear(x, weight, bias)  # raises, as the base alone would
    with _NULL_CONTEXT if dtype is None else disable_autocast(x.device.type):
        if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
            y: Tensor = LoraLinearFunction.apply(x, weight, bias, a, b, scaling, dropout)
            return y
        x = cast_once(x, weight.dtype)
        return _add_update(functional.linear(x, weight, bias), x, a, b, scaling, dropout)


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, *, dropout: float = 0.0) -> Tensor:
    """Return y + scaling · (drop(x) Aᵀ) Bᵀ.

    Args:
        y: (..., out), the base's output; overwritten with the result unless it is a view.
        x: (..., in), the base's input; leading sizes as in y.
        a, b, scaling, dropout: as in `lora_linear`.

    Returns:
        (..., out) in the dtype of y. Gradients go to y, x, a and b, those of a and b in their own dtypes.
    """
    if torch.compiler.is_compiling():
        return _add_by_equation(y, x, a, b, scaling, dropout)
    with disable_autocast(y.device.type):
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or a.requires_grad or b.requires_grad):
            updated: Tensor = LoraAddFunction.apply(y, x, a, b, scaling, dropout)
            return updated
        return _add_update(y if can_overwrite(y) else copy_contiguous(y), cast_once(x, y.dtype), a, b, scaling, dropout)


def lora_add_rows(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """Return yᵢ + scaling[kᵢ] · (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ for every row i, with k = slots.

    The number of operations does not depend on how many different slots there are.

    Args:
        y: (n, ..., out), the base's output; overwritten with the result unless it is a view.
        x: (n, ..., in); n is a multiple of R, and each run of n/R entries belongs to one row (beams, flattened tokens).
        a: (S, r, in), of any floating-point dtype. Slot 0 is the base and holds zeros, here and below.
        b: (S, out, r), likewise.
        scaling: (S,) fp32.
        slots: (R,) int64, each from 0 to S - 1.

    Returns:
        (n, ..., out) in the dtype of y. Gradients go to y, x, a and b.
    """
    if torch.compiler.is_compiling() and (torch.is_grad_enabled() or dispatch.get_kernels(y) is torch_kernels):
        # The plain equation for the compiler, unless there are kernels that read stacked weights without a copy.
        rows = slots.shape[0]
        h = torch.bmm(x.to(y.dtype).reshape(rows, -1, x.shape[-1]), a[slots].to(y.dtype).mT)
        h = (h * scaling[slots].view(-1, 1, 1)).to(y.dtype)
        return y + torch.bmm(h, b[slots].to(y.dtype).mT).view(y.shape)
    with disable_autocast(y.device.type):
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or a.requires_grad or b.requires_grad):
            updated: Tensor = LoraAddRowsFunction.apply(y, x, a, b, scaling, slots)
            return updated
        y = y if can_overwrite(y) else copy_contiguous(y)
        rows = slots.shape[0]
        flat = cast_once(x, y.dtype).reshape(rows, -1, x.shape[-1])
        dispatch.get_kernels(y).add_rows_(y.view(rows, -1, y.shape[-1]), flat, a, b, scaling, slots)
        return y


def lora_add_embedding(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return y + scaling · Aᵀ[ids] Bᵀ: `lora_add` for a look-up, where x would be one-hot and is never made.

    Args:
        y: (..., dim), the looked-up embeddings.
        ids: (...) int64.
        a: (r, entries).
        b: (dim, r).
        scaling: a number.

    Returns:
        (..., dim) in the dtype of y; a new tensor.
    """
    h = functional.embedding(ids, a.mT).to(y.dtype)
    return torch.add(y, h @ b.to(y.dtype).mT, alpha=scaling)


def lora_add_embedding_rows(y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """Do as `lora_add_rows` for a look-up.

    Args:
        y: (n, ..., dim), the looked-up embeddings.
        ids: (n, ...) int64; n is a multiple of R.
        a: (S, r, entries).
        b: (S, dim, r).
        scaling: (S,) fp32.
        slots: (R,) int64.

    Returns:
        (n, ..., dim) in the dtype of y; a new tensor.
    """
    rows = slots.shape[0]
    slot_of = slots.repeat_interleave(ids.numel() // rows)
    h = a[slot_of, :, ids.reshape(-1)] * scaling[slot_of].unsqueeze(-1)  # (tokens, r)
    h = h.to(y.dtype).view(rows, -1, a.shape[1])
    return y + torch.bmm(h, b[slots].to(y.dtype).mT).view(y.shape)


def _add_by_equation(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor:
    """Return the plain equation, for the compiler, which fuses and schedules by itself."""
    if dropout:
        x = functional.dropout(x, dropout)
    h = x.to(y.dtype) @ a.to(y.dtype).mT
    return torch.add(y, h @ b.to(y.dtype).mT, alpha=scaling)


def _add_update(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float) -> Tensor:
    """Add the update of x to y in place and return y; x is of its dtype, and nothing needs a gradient."""
    if dropout:
        x = functional.dropout(x, dropout)
    dispatch.get_kernels(y).add_(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, scaling)
    return y


def autocast_dtype_of(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts a linear layer's input; None where it casts nothing."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


_NULL_CONTEXT = contextlib.nullcontext()


def disable_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off where it is on: the dtype is chosen already."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NULL_CONTEXT
