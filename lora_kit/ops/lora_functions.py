"""The autograd functions of `ops.lora`, which keep x and the rank-r product for the backward, and nothing else."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from lora_kit.errors import BankError
from lora_kit.ops import dispatch

_CHANGED: Final = "an adapter, or the base below it, was changed between this forward and its backward"
_CHANGED_HINT: Final = "run the backward before restore, merge, unload or an optimizer step, or hold a lease"

_last_cast: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None
"""The tensor cast last, its version, and the cast: layers that read the same x (q, k and v) share one cast of it."""


def cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
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


class SavedTensors(Protocol):
    """A context of an autograd function in its backward."""

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...


class _UpdateContext(FunctionCtx):
    update: LoraUpdate
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _RowsContext(FunctionCtx):
    x_dtype: torch.dtype
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


def read_saved(ctx: SavedTensors) -> tuple[Tensor, ...]:
    """Return what the forward saved.

    Raises:
        BankError: it was changed in place since then, so the gradient would be of something else.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise BankError(_CHANGED, hint=_CHANGED_HINT) from error


def guard_backward(output: object, tensors: Iterable[Tensor]) -> None:
    """Let a backward through an output raise BankError once one of these tensors was changed in place since now.

    It is for what torch computes by itself: torch would say that "one of the variables" was changed.

    Args:
        output: a tensor, or tensors in tuples, lists and dictionaries.
        tensors: that the backward reads.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    nodes = [y.grad_fn for y in iterate_tensors(output) if y.grad_fn is not None]
    versions = [(tensor, tensor._version) for tensor in tensors] if nodes else []
    if versions:
        for node in nodes:
            node.register_prehook(functools.partial(_check_versions, versions))


def iterate_tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a value, in tuples, lists and dictionaries too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from iterate_tensors(each)


def _check_versions(versions: Sequence[tuple[Tensor, int]], gradients: object) -> None:
    if any(tensor._version != version for tensor, version in versions):
        raise BankError(_CHANGED, hint=_CHANGED_HINT)


class LoraUpdate:
    """s · (drop(x) Aᵀ) Bᵀ added to y, and its gradients.

    With g = dY B (tokens, r):  dX += s · g A,  dA = s · gᵀ x,  dB = s · dYᵀ (x Aᵀ).

    Args:
        scaling: s.
        dropout: probability of dropping an element of x.
        x_dtype: of the layer's input, before it was cast.
    """

    def __init__(self, scaling: float, dropout: float, x_dtype: torch.dtype) -> None:
        self.scaling, self.x_dtype = scaling, x_dtype
        self._probability = dropout
        self._dropout: _Dropout | None = None

    def add_(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Add to y in place, and return x Aᵀ, which the backward needs beside x, A and B."""
        flat = x.reshape(-1, x.shape[-1])
        if self._probability:
            self._dropout = _Dropout(self._probability, x.device)
            flat = flat * self._dropout.mask(x).reshape(flat.shape)  # in the memory order of x, like F.dropout's
        return dispatch.get_kernels(y).add_(y.view(-1, y.shape[-1]), flat, a, b, self.scaling)

    def gradients(
        self, dy: Tensor, base: Tensor | None, saved: tuple[Tensor, ...], needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (dX, dA, dB), None for those that are not needed.

        Args:
            dy: (n, out).
            base: (n, in), the base's part of dX, which is overwritten; None where the base was computed elsewhere.
            saved: x, A, B and x Aᵀ; under checkpointing they can be read only once.
            needs: whether dX, dA and dB are needed.
        """
        x, a, b, h = saved
        needs_x, needs_a, needs_b = needs
        flat = x.reshape(-1, x.shape[-1])
        mask = self._dropout.redraw_mask(x).reshape(flat.shape) if self._dropout is not None else None
        if base is not None and mask is None:
            g = dispatch.get_kernels(dy).add_(base, dy, b.mT, a.mT, self.scaling)
        else:
            g = dy @ b.to(dy.dtype)
            if needs_x:
                dx = (g @ a.to(dy.dtype)).mul_(self.scaling)
                dx = dx if mask is None else dx.mul_(mask)
                base = dx if base is None else base.add_(dx)
        flat = flat if mask is None else flat * mask
        da = (g.mT @ flat).mul_(self.scaling).to(a.dtype) if needs_a else None
        # hᵀ dY is faster than dYᵀ h on a CPU, and has the memory order of a stacked B.
        db = (h.mT @ dy).mul_(self.scaling).mT.to(b.dtype) if needs_b else None
        return None if base is None else base.view(x.shape).to(self.x_dtype), da, db


class LoraLinearFunction(torch.autograd.Function):
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
        ctx.update = LoraUpdate(scaling, dropout, x.dtype)
        x = cast_once(x, weight.dtype)
        y = without_base(functional.linear(x, weight, bias))
        ctx.save_for_backward(x, a, b, ctx.update.add_(y, x, a, b), weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _UpdateContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        d = dy.reshape(-1, dy.shape[-1])
        *saved, weight = read_saved(ctx)
        base = d @ weight if needs_x else None
        dx, da, db = ctx.update.gradients(d, base, tuple(saved), (needs_x, needs_a, needs_b))
        return dx, None, None, da, db, None, None


class LoraAddFunction(torch.autograd.Function):
    """y + s (drop(x) Aᵀ) Bᵀ; dY passes through."""

    @staticmethod
    def forward(
        ctx: _UpdateContext, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float
    ) -> Tensor:
        ctx.update = LoraUpdate(scaling, dropout, x.dtype)
        x, y = cast_once(x, y.dtype), ensure_writable(ctx, y)
        ctx.save_for_backward(x, a, b, ctx.update.add_(y, x, a, b))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _UpdateContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        d, needs = dy.reshape(-1, dy.shape[-1]), (needs_x, needs_a, needs_b)
        dx, da, db = ctx.update.gradients(d, None, read_saved(ctx), needs)
        return dy, dx, da, db, None, None


class LoraAddRowsFunction(torch.autograd.Function):
    """yᵢ + s[kᵢ] (xᵢ A[kᵢ]ᵀ) B[kᵢ]ᵀ; the gradients of `LoraUpdate` row by row, those of A and B summed by slot."""

    @staticmethod
    def forward(
        ctx: _RowsContext, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor
    ) -> Tensor:
        ctx.x_dtype = x.dtype
        x, y, rows = cast_once(x, y.dtype), ensure_writable(ctx, y), slots.shape[0]
        into, flat = y.view(rows, -1, y.shape[-1]), x.reshape(rows, -1, x.shape[-1])
        h = dispatch.get_kernels(y).add_rows_(into, flat, a, b, scaling, slots)  # (R, tokens, r)
        ctx.save_for_backward(x, a, b, scaling, slots, h)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _RowsContext, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, scaling, slots, h = read_saved(ctx)
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


def without_base(y: Tensor) -> Tensor:
    """Return y in the same memory as a tensor that is no view.

    With a bias, torch's linear returns a view of its two-dimensional product. Autograd forbids a model to change a view
    in place (`relu_`, `y += x`) when an autograd function returned it. Only for a y whose memory nothing else reads.
    """
    owned: Tensor = torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y
    return owned


def copy_contiguous(y: Tensor) -> Tensor:
    return y.clone(memory_format=torch.contiguous_format)


def ensure_writable(ctx: FunctionCtx, y: Tensor) -> Tensor:
    """Return y itself, marked as overwritten, or a copy where it may not be overwritten."""
    if not can_overwrite(y):
        return copy_contiguous(y)
    ctx.mark_dirty(y)
    return y


def _sum_by_slot(rows: Tensor, scaling: Tensor, slots: Tensor, *, like: Tensor) -> Tensor:
    """Return s · rows (R, p, q), summed by slot into (S, p, q), in the dtype of `like`."""
    scaled = rows.to(like.dtype) * scaling.index_select(0, slots).to(like.dtype).view(-1, 1, 1)
    return torch.zeros_like(like).index_add_(0, slots, scaled)
