"""The low-rank updates of several adapters, each on its own consecutive tokens, in one product of the base.

    lora_linear_spans  x Wᵀ + bias, then y[span] += s · (x[span] Aᵀ) Bᵀ for every span, with A, B and s of its adapter
    lora_add_spans     the same for a base that is a black box with output y

A span's products, and their gradients, are those of `ops.lora` for its tokens alone, at the rank of its adapter. Only
the base's product, and its part of dX, are taken once over all tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from lora_kit.ops.lora import autocast_dtype_of, disable_autocast
from lora_kit.ops.lora_functions import LoraUpdate, cast_once, ensure_writable, read_saved, without_base


@dataclass(frozen=True)
class LoraSpan:
    """Consecutive tokens and the LoRA weights that they use.

    Attributes:
        start, end: the tokens: start, ..., end - 1.
        a: (r, in), of any floating-point dtype.
        b: (out, r), likewise.
        scaling: of their product.
        dropout: probability of dropping an element of x on its way to A.
        use_random_state: the context in which random numbers of this span are drawn.
    """

    start: int
    end: int
    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    use_random_state: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def lora_linear_spans(x: Tensor, weight: Tensor, bias: Tensor | None, spans: Sequence[LoraSpan]) -> Tensor:
    """Return x Wᵀ + bias with the update of each span.

    Args:
        x: (..., in); a token is an entry of its leading axes, in their order.
        weight: W (out, in), frozen, in any memory order.
        bias: (out,), frozen, or None.
        spans: that do not overlap; tokens outside of them use the base.

    Returns:
        (..., out), of the dtype that a linear layer would return. Gradients go to x, and to A and B of each span.
    """
    dtype = autocast_dtype_of(x)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        return functional.linear(x, weight, bias)  # raises, as the base alone would
    with contextlib.nullcontext() if dtype is None else disable_autocast(x.device.type):
        y: Tensor = _LinearSpansFunction.apply(x, weight, bias, spans, *_list_leaves(spans))
        return y


def lora_add_spans(y: Tensor, x: Tensor, spans: Sequence[LoraSpan]) -> Tensor:
    """Return y with the update of each span.

    Args:
        y: (..., out), the base's output; overwritten with the result unless it is a view.
        x: (..., in), the base's input; leading sizes as in y.
        spans: as in `lora_linear_spans`.

    Returns:
        (..., out) in the dtype of y. Gradients go to y, x, and to A and B of each span.
    """
    with disable_autocast(y.device.type):
        updated: Tensor = _AddSpansFunction.apply(y, x, spans, *_list_leaves(spans))
        return updated


def _list_leaves(spans: Sequence[LoraSpan]) -> list[Tensor]:
    """Return A and B of every span, as autograd takes them: one after another."""
    return [leaf for span in spans for leaf in (span.a, span.b)]


class _SpansContext(FunctionCtx):
    spans: Sequence[LoraSpan]
    updates: list[LoraUpdate]
    x_dtype: torch.dtype
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def _add_updates_(ctx: _SpansContext, y: Tensor, x: Tensor, *weights: Tensor) -> None:
    """Add every span's update to y in place, and save what the backward needs."""
    into, flat = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    ctx.updates, products = [], []
    for span in ctx.spans:
        update = LoraUpdate(span.scaling, span.dropout, x.dtype)
        with span.use_random_state() if span.dropout else contextlib.nullcontext():
            products.append(update.add_(into[span.start : span.end], flat[span.start : span.end], span.a, span.b))
        ctx.updates.append(update)
    ctx.save_for_backward(x, *weights, *_list_leaves(ctx.spans), *products)


def _compute_gradients(
    ctx: _SpansContext, dy: Tensor, x: Tensor, saved: Sequence[Tensor], dx: Tensor | None, *, has_base: bool
) -> list[Tensor | None]:
    """Return dA and dB of every span, and write its part of dX into `dx` (n, in), where that is given.

    Args:
        dy: (n, out).
        saved: A and B of every span, then x Aᵀ of every span.
        has_base: whether the base's part of dX is in `dx` already.
    """
    count = len(ctx.spans)
    leaves, products, needs = saved[: 2 * count], saved[2 * count :], ctx.needs_input_grad[-2 * count :]
    flat, gradients = x.reshape(-1, x.shape[-1]), list[Tensor | None]()
    for number, (span, update) in enumerate(zip(ctx.spans, ctx.updates, strict=True)):
        own, pair = slice(span.start, span.end), slice(2 * number, 2 * number + 2)
        base = dx[own] if dx is not None and has_base else None
        needed = dx is not None, needs[2 * number], needs[2 * number + 1]
        part, da, db = update.gradients(dy[own], base, (flat[own], *leaves[pair], products[number]), needed)
        if dx is not None and part is not None and not has_base:
            dx[own] = part
        gradients += [da, db]
    return gradients


class _LinearSpansFunction(torch.autograd.Function):
    """x Wᵀ + bias, W and bias frozen, with the update of each span."""

    @staticmethod
    def forward(
        ctx: _SpansContext, x: Tensor, weight: Tensor, bias: Tensor | None, spans: Sequence[LoraSpan], *leaves: Tensor
    ) -> Tensor:
        ctx.spans, ctx.x_dtype = spans, x.dtype
        x = cast_once(x, weight.dtype)
        y = without_base(functional.linear(x, weight, bias))
        _add_updates_(ctx, y, x, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _SpansContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        d = dy.reshape(-1, dy.shape[-1])
        x, weight, *saved = read_saved(ctx)
        dx = d @ weight if ctx.needs_input_grad[0] else None
        gradients = _compute_gradients(ctx, d, x, saved, dx, has_base=True)
        return None if dx is None else dx.view(x.shape).to(ctx.x_dtype), None, None, None, *gradients


class _AddSpansFunction(torch.autograd.Function):
    """y with the update of each span; dY passes through."""

    @staticmethod
    def forward(ctx: _SpansContext, y: Tensor, x: Tensor, spans: Sequence[LoraSpan], *leaves: Tensor) -> Tensor:
        ctx.spans, ctx.x_dtype = spans, x.dtype
        x, y = cast_once(x, y.dtype), ensure_writable(ctx, y)
        _add_updates_(ctx, y, x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _SpansContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        d = dy.reshape(-1, dy.shape[-1])
        x, *saved = read_saved(ctx)
        dx = d.new_zeros(d.shape[0], x.shape[-1]) if ctx.needs_input_grad[1] else None
        gradients = _compute_gradients(ctx, d, x, saved, dx, has_base=False)
        return dy, None if dx is None else dx.view(x.shape).to(ctx.x_dtype), None, *gradients
