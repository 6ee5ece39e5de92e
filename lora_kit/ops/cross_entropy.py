"""Cross-entropy over a frozen head, in chunks of rows: the logits of a batch never exist.

With z = h Wᵀ + bias, E = exp(z - max z), s = Σ E, and y the label of a row,

    loss = log s - (z_y - max z)
    d loss / dh = Σ_{j ≠ y} (E_j / s) W_j - (Σ_{j ≠ y} E_j / s) W_y

Since W is frozen, dh is the only gradient. It is computed in the forward, while a chunk's logits exist: that takes two
products with W and keeps only dh, where autograd keeps all logits. Rows without a label cost nothing. (Chunks with the
gradient in the forward: Liger, arXiv 2410.10989; there for heads that are trained.) The label's own term is not in the
product, so that its coefficient, by far the largest, is never rounded to 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lora_kit.errors import DataError

LOGITS_BYTES: Final = {"cpu": 2**25, "cuda": 2**28}
"""Bytes of logits that exist at once by default, in the dtype of the sums."""
MIN_CHUNK_ROWS: Final = 128
"""Rows at once at least: with fewer, reading W costs more than multiplying with it. On a CPU the two limits give 262
rows of 32,000 logits or 128 of 128,256 (half as many are a fifth slower, more are hardly faster); on a GPU 512 of the
latter."""


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Return the cross-entropy of `hidden @ weight.T + bias` in nats, summed over the rows that have a label.

    Sums and exponentials are computed in fp32 (in fp64 for fp64), the products with W in the dtype that a linear layer
    would use, under autocast too. No gradient is computed where none is needed.

    Args:
        hidden: (n, d).
        weight: (v, d), frozen.
        labels: (n,) int64, each in 0 … v - 1 or `ignore_index`: no label.
        bias: (v,), frozen.
        chunk: rows at once; None for as many as `LOGITS_BYTES` hold, at least `MIN_CHUNK_ROWS`. It changes no result.
        smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv 1512.00567).

    Returns:
        () in fp32 or fp64. The gradient goes to `hidden` alone.

    Raises:
        DataError: shapes or dtypes do not match, the head is not frozen, or (checked on a CPU only, where it costs no
            synchronization) a label is no class.
    """
    _check_shapes(hidden, weight, bias, labels)
    dtype = _compute_dtype_of(hidden)
    if weight.dtype != dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise DataError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}; outside autocast both must be of one dtype"
        )
    rows = (labels != ignore_index).nonzero().squeeze(1)
    labels = labels.index_select(0, rows)
    if labels.device.type == "cpu":
        _check_labels(labels, weight.shape[0])
    return sum_row_losses(
        hidden, weight, labels, rows, bias=bias, chunk=chunk or choose_chunk(hidden, len(weight)), smoothing=smoothing
    )


def choose_chunk(hidden: Tensor, classes: int, *, device: str | None = None) -> int:
    """Return how many rows of logits exist at once.

    Args:
        device: type of the device; None for that of `hidden`.
    """
    sums = torch.promote_types(_compute_dtype_of(hidden), torch.float32)
    budget = LOGITS_BYTES["cpu" if (device or hidden.device.type) == "cpu" else "cuda"]
    return max(MIN_CHUNK_ROWS, budget // (classes * sums.itemsize))


def sum_row_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int,
    smoothing: float = 0.0,
) -> Tensor:
    """Return `chunked_cross_entropy` where the rows that have a label are known; no value of a tensor is looked at.

    Args:
        labels: of those rows: (k,) int64.
        rows: their index in `hidden`: (k,) int64.
    """
    dtype = _compute_dtype_of(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        head = _FrozenHead(weight.to(dtype), None if bias is None else bias.to(dtype), labels, rows, chunk, smoothing)
        if torch.is_grad_enabled() and hidden.requires_grad:
            total: Tensor = _ChunkedCrossEntropy.apply(hidden, head)
            return total
        with torch.no_grad():
            return head.loss(hidden, gradient=None)


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    n, d, v = hidden.shape[0] if hidden.ndim else 0, hidden.shape[-1:], weight.shape[:1]
    matches = hidden.ndim == weight.ndim == 2 and weight.shape[1:] == d and labels.shape == (n,)
    if not matches or (bias is not None and bias.shape != v):
        shapes = ", ".join(str(tuple(t.shape)) for t in (hidden, weight, labels, bias) if t is not None)
        raise DataError(
            f"hidden (n, d), weight (v, d), labels (n,) and bias (v,) were expected; the shapes are {shapes}"
        )
    if labels.dtype != torch.int64:
        raise DataError(f"labels must be int64; they are {labels.dtype}")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise DataError("the head requires a gradient, and none is computed for it here", hint="use the plain loss")


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            raise DataError(f"label {low if low < 0 else high} is outside the {classes} classes")


def _compute_dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer computes with this input."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


@dataclass(frozen=True)
class _FrozenHead:
    """A head, and the labeled rows whose loss it computes.

    Attributes:
        weight: (v, d).
        bias: (v,), of the dtype of the weight.
        labels: (k,) int64, of the labeled rows.
        rows: (k,) int64, index in `hidden` of each labeled row.
        chunk: rows at once.
        smoothing: of labels.
    """

    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    rows: Tensor
    chunk: int
    smoothing: float

    def loss(self, hidden: Tensor, *, gradient: Tensor | None) -> Tensor:
        """Return the summed loss, and write d loss / d hidden of the labeled rows into `gradient` (k, d) if given."""
        classes, dtype = self.weight.shape[0], self.weight.dtype
        size = min(self.chunk, len(self.rows))
        logits = hidden.new_empty(size, classes, dtype=dtype)
        sums = torch.promote_types(dtype, torch.float32)
        wide = logits if sums == dtype else hidden.new_empty(size, classes, dtype=sums)
        center = self.weight.mean(0, dtype=sums) if self.smoothing and gradient is not None else None
        total = hidden.new_zeros((), dtype=sums)
        for start in range(0, len(self.rows), self.chunk):
            here = slice(start, min(start + self.chunk, len(self.rows)))
            x = hidden.index_select(0, self.rows[here]).to(dtype)
            narrow, z = logits[: len(x)], wide[: len(x)]
            self._compute_logits(x, out=narrow)
            if z.dtype != dtype:
                z.copy_(narrow)
            label = self.labels[here].unsqueeze(1)
            loss, others, s = self._exponentiate_(z, label)
            total += loss
            if gradient is not None:
                narrow.copy_(z)
                torch.div(narrow @ self.weight, s, out=gradient[here])
                own = self.weight.index_select(0, self.labels[here])
                gradient[here].addcmul_(own, others / s - self.smoothing, value=-1)
                if center is not None:
                    gradient[here].sub_(center, alpha=self.smoothing)
        return total

    def _compute_logits(self, x: Tensor, *, out: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight.mT, out=out)
        else:
            torch.addmm(self.bias, x, self.weight.mT, out=out)

    def _exponentiate_(self, z: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn logits in place into E with a zero at each label.

        Args:
            z: (k, v), overwritten.
            label: (k, 1).

        Returns:
            the summed loss (), Σ_{j ≠ y} E_j (k, 1), and s (k, 1).
        """
        z.sub_(z.amax(1, keepdim=True))
        own = z.gather(1, label)
        target = own
        if self.smoothing:
            target = own * (1 - self.smoothing) + z.mean(1, keepdim=True) * self.smoothing
        others = z.exp_().scatter_(1, label, 0).sum(1, keepdim=True)
        s = others + own.exp()
        return (s.log() - target).sum(), others, s


class _LossContext(FunctionCtx):
    shape: torch.Size
    dtype: torch.dtype
    saved_tensors: tuple[Tensor, ...]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss of the labeled rows; the backward only multiplies the gradient that the forward computed."""

    @staticmethod
    def forward(ctx: _LossContext, hidden: Tensor, head: _FrozenHead) -> Tensor:
        # In the dtype of the sums, so that it is rounded once, after it has been multiplied.
        sums = torch.promote_types(head.weight.dtype, torch.float32)
        gradient = hidden.new_empty(len(head.rows), hidden.shape[1], dtype=sums)
        loss = head.loss(hidden, gradient=gradient)
        ctx.save_for_backward(gradient, head.rows)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _LossContext, d_loss: Tensor) -> tuple[Tensor, None]:
        gradient, rows = ctx.saved_tensors
        d_hidden = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        return d_hidden.index_copy_(0, rows, (gradient * d_loss).to(ctx.dtype)), None
