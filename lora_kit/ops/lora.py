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
import weakref

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from lora_kit.ops import dispatch, torch_kernels


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
    dtype = _autocast_dtype(x)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        return functional.linear(x, weight, bias)  # raises, as the base alone would
    with _NULL_CONTEXT if dtype is None else _disable_autocast(x.device.type):
        if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
            y: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scaling, dropout)
            return y
        x = _cast(x, weight.dtype)
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
    with _disable_autocast(y.device.type):
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or a.requires_grad or b.requires_grad):
            updated: Tensor = _LoraAdd.apply(y, x, a, b, scaling, dropout)
            return updated
        return _add_update(y if can_overwrite(y) else _copy(y), _cast(x, y.dtype), a, b, scaling, dropout)


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
    with _disable_autocast(y.device.type):
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or a.requires_grad or b.requires_grad):
            updated: Tensor = _LoraAddRows.apply(y, x, a, b, scaling, slots)
            return updated
        y = y if can_overwrite(y) else _copy(y)
        rows = slots.shape[0]
        flat = _cast(x, y.dtype).reshape(rows, -1, x.shape[-1])
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


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts a linear layer's input; None where it casts nothing."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


_NULL_CONTEXT = contextlib.nullcontext()


def _disable_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off where it is on: the dtype is chosen already."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NULL_CONTEXT


_last_cast: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None
"""The tensor cast last, its version, and the cast: layers that read the same x (q, k and v) share one cast of it."""


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype, the same tensor for consecutive calls with the same x. Nothing is kept alive."""
    global _last_cast
    if x.dtype == dtype:
        return x
    if x.is_inference():  # such tensors do not count their versions
        return x.to(dtype)
    if _last_cast is not None:
        source, version, cast = _last_cast[0](), _last_cast[1], _last_cast[2]()
        if source is x and version == x._version and cast is not None and cast.dtype == dtype:
            return cast
    cast = x.to(dtype)
    _last_cast = (weakref.ref(x), x._version, weakref.ref(cast))
    return cast


def can_overwrite(y: Tensor) -> bool:
    """Return whether y may be overwritten: it is no view of other memory, and no leaf that requires grad."""
    return y.is_contiguous() and not y._is_view() and not (y.is_leaf and y.requires_grad)


class _Dropout:
    """A dropout whose mask is drawn again in the backward instead of being saved; bitwise `F.dropout` on a CPU."""

    def __init__(self, p: float, device: torch.device) -> None:
        self.p, self.device = p, device
        self.state = _default_generator_of(device).get_state()

    def mask(self, x: Tensor) -> Tensor:
        """Draw the forward's mask, 0 or 1 / (1 - p) for every element of x, from the global generator."""
        return torch.empty_like(x).bernoulli_(1 - self.p).div_(1 - self.p)

    def redraw_mask(self, x: Tensor) -> Tensor:
        """Draw the mask of the forward again."""
        generator = torch.Generator(self.device)
        generator.set_state(self.state)
        return torch.empty_like(x).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)


def _default_generator_of(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


class _UpdateContext(FunctionCtx):
    scaling: float
    dropout: _Dropout | None
    x_dtype: torch.dtype
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _LowRankUpdate:
    """What the two functions of one A and B share: s · (drop(x) Aᵀ) Bᵀ added to y, and its gradients.

    With g = dY B (tokens, r):  dX += s · g A,  dA = s · gᵀ x,  dB = s · dYᵀ (x Aᵀ).
    """

    @staticmethod
    def add_(
        ctx: _UpdateContext, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float, *more: Tensor
    ) -> None:
        """Add to y in place, and save what the backward needs, and `more`."""
        flat = x.reshape(-1, x.shape[-1])
        ctx.scaling = scaling
        ctx.dropout = _Dropout(dropout, x.device) if dropout else None
        if ctx.dropout is not None:
            flat = flat * ctx.dropout.mask(x).reshape(flat.shape)  # in the memory order of x, like F.dropout's
        h = dispatch.get_kernels(y).add_(y.view(-1, y.shape[-1]), flat, a, b, scaling)
        ctx.save_for_backward(x, a, b, h, *more)

    @staticmethod
    def gradients(
        ctx: _UpdateContext, dy: Tensor, base: Tensor | None, saved: tuple[Tensor, ...], needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (dX, dA, dB), None for those that are not needed.

        Args:
            dy: (n, out).
            base: (n, in), the base's part of dX, which is overwritten; None where the base was computed elsewhere.
            saved: what `add_` saved; under checkpointing it can be read only once.
            needs: whether dX, dA and dB are needed.
        """
        x, a, b, h = saved
        needs_x, needs_a, needs_b = needs
        flat = x.reshape(-1, x.shape[-1])
        mask = ctx.dropout.redraw_mask(x).reshape(flat.shape) if ctx.dropout is not None else None
        if base is not None and mask is None:
            g = dispatch.get_kernels(dy).add_(base, dy, b.mT, a.mT, ctx.scaling)
        else:
            g = dy @ b.to(dy.dtype)
            if needs_x:
                dx = (g @ a.to(dy.dtype)).mul_(ctx.scaling)
                dx = dx if mask is None else dx.mul_(mask)
                base = dx if base is None else base.add_(dx)
        flat = flat if mask is None else flat * mask
        da = (g.mT @ flat).mul_(ctx.scaling).to(a.dtype) if needs_a else None
        # hᵀ dY is faster than dYᵀ h on a CPU, and has the memory order of a stacked B.
        db = (h.mT @ dy).mul_(ctx.scaling).mT.to(b.dtype) if needs_b else None
        return None if base is None else base.view(x.shape).to(ctx.x_dtype), da, db


class _LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ, W and bias frozen."""

    @staticmethod
    def forward(
        ctx: _UpdateContext,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        x = _cast(x, weight.dtype)
        y = _without_base(functional.linear(x, weight, bias))
        _LowRankUpdate.add_(ctx, y, x, a, b, scaling, dropout, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _UpdateContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        d = dy.reshape(-1, dy.shape[-1])
        *saved, weight = ctx.saved_tensors
        base = d @ weight if needs_x else None
        dx, da, db = _LowRankUpdate.gradients(ctx, d, base, tuple(saved), (needs_x, needs_a, needs_b))
        return dx, None, None, da, db, None, None


class _LoraAdd(torch.autograd.Function):
    """y + s (drop(x) Aᵀ) Bᵀ; dY passes through."""

    @staticmethod
    def forward(
        ctx: _UpdateContext, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        y = _ensure_writable(ctx, y)
        _LowRankUpdate.add_(ctx, y, _cast(x, y.dtype), a, b, scaling, dropout)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _UpdateContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        d, needs = dy.reshape(-1, dy.shape[-1]), (needs_x, needs_a, needs_b)
        dx, da, db = _LowRankUpdate.gradients(ctx, d, None, ctx.saved_tensors, needs)
        return dy, dx, da, db, None, None


class _LoraAddRows(torch.autograd.Function):
    """yᵢ + s[kᵢ] (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ; the gradients of `_LowRankUpdate` row by row, those of A and B summed by slot."""

    @staticmethod
    def forward(
        ctx: _UpdateContext, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        x, y, rows = _cast(x, y.dtype), _ensure_writable(ctx, y), slots.shape[0]
        into, flat = y.view(rows, -1, y.shape[-1]), x.reshape(rows, -1, x.shape[-1])
        h = dispatch.get_kernels(y).add_rows_(into, flat, a, b, scaling, slots)  # (R, tokens, r)
        ctx.save_for_backward(x, a, b, scaling, slots, h)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _UpdateContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, scaling, slots, h = ctx.saved_tensors
        rows, kernels = slots.shape[0], dispatch.get_kernels(dy)
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        d, x3 = dy.reshape(rows, -1, dy.shape[-1]), x.reshape(rows, -1, x.shape[-1])
        dx = None
        if needs_x:
            dx = torch.zeros_like(x3, memory_format=torch.contiguous_format)
            g = kernels.add_rows_(dx, d, b.mT, a.mT, scaling, slots)  # (R, tokens, r)
            dx = dx.view(x.shape).to(ctx.x_dtype)
        else:
            g = kernels.shrink_rows(d, b.mT, slots)
        da = _sum_by_slot(torch.bmm(g.mT, x3), scaling, slots, like=a) if needs_a else None
        db = _sum_by_slot(torch.bmm(h.mT, d).mT, scaling, slots, like=b) if needs_b else None
        return dy, dx, da, db, None, None


def _without_base(y: Tensor) -> Tensor:
    """Return y in the same memory as a tensor that is no view.

    With a bias, torch's linear returns a view of its two-dimensional product. Autograd forbids a model to change a view
    in place (`relu_`, `y += x`) when an autograd function returned it. Only for a y whose memory nothing else reads.
    """
    owned: Tensor = torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
    return owned


def _copy(y: Tensor) -> Tensor:
    return y.clone(memory_format=torch.contiguous_format)


def _ensure_writable(ctx: _UpdateContext, y: Tensor) -> Tensor:
    """Return y itself, marked as overwritten, or a copy where it may not be overwritten."""
    if not can_overwrite(y):
        return _copy(y)
    ctx.mark_dirty(y)
    return y


def _sum_by_slot(rows: Tensor, scaling: Tensor, slots: Tensor, *, like: Tensor) -> Tensor:
    """Return s · rows (R, p, q), summed by slot into (S, p, q), in the dtype of `like`."""
    scaled = rows.to(like.dtype) * scaling.index_select(0, slots).to(like.dtype).view(-1, 1, 1)
    return torch.zeros_like(like).index_add_(0, slots, scaled)
