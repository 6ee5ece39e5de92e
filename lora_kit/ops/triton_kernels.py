"""The products of `ops.torch_kernels` as Triton kernels: same signatures, same meaning.

The products themselves are small; what is saved over plain torch is memory traffic and launches:

- A and B are read in place, whether they are fp32 masters, bf16 stacked weights or a part of these, and are cast in
  registers: no cast copy of them and no gathered copy of a slot is ever written.
- For few tokens that share A and B, as in decoding, x Aᵀ and the update are one launch. Everything else is two, a
  shrink to the rank and an expand that adds to y, each in one pass over its large operand.
- Rows of slot 0, the base, read no A or B and leave y unchanged. Launches depend on shapes, never on the slots.

Products are accumulated in fp32. Those of fp32 inputs are fp32 products unless torch allows TF32
(`torch.backends.cuda.matmul`). The order of sums is fixed: the same inputs give the same bits.

Gradients are the same products with the factors transposed (views will do):

    uniform    g = add_(dx, dy, bᵀ, aᵀ, s)         dx += s · (dy B) A,  g = dy B;     dA = s · gᵀ x,  dB = s · dyᵀ h
    routed     g = add_rows_(dx, dy, bᵀ, aᵀ, scaling, slots)

where dA and dB, which sum over all tokens, are torch's own products.

Nothing here waits for the device, so CUDA graphs can capture it after a first run has loaded the kernels: as for every
graph, make the same call once before the capture. Eager code launches the kernels directly; while torch.compile
traces, the same functions are opaque custom ops without a gradient. They are `custom_op`s, not `triton_op`s, because
the compiler could fuse nothing into them, and because `custom_op`s also run interpreted.
"""

# The arguments of kernels have no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Final

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

MIN_BLOCK_TOKENS: Final = 16
"""The fewest tokens that a matrix unit takes. Up to so many share one program, or have one each."""

TARGET_PROGRAMS: Final = 128
"""Programs that keep a device busy. A shrink that would have fewer splits its sum over several programs."""

MAX_FUSED_RANK: Final = 64
"""The largest rank of the fused kernel."""
MAX_FUSED_ENTRIES: Final = 1 << 17
"""The most entries of A for which every program of the fused kernel reads all of A, from cache, by itself."""


def add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Do as `torch_kernels.add_`."""
    if torch.compiler.is_compiling():
        h: Tensor = _add_op(y, x, a, b, scaling)
        return h
    return _add(y.unsqueeze(0), x.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0), scaling, None).squeeze(0)


def add_rows_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    """Do as `torch_kernels.add_rows_`."""
    if torch.compiler.is_compiling():
        h: Tensor = _add_rows_op(y, x, a, b, scaling, slots)
        return h
    return _add(y, x, a, b, scaling, slots)


def shrink_rows(x: Tensor, a: Tensor, slots: Tensor) -> Tensor:
    """Do as `torch_kernels.shrink_rows`."""
    if torch.compiler.is_compiling():
        h: Tensor = _shrink_op(x, a, slots)
        return h
    return _shrink(x, a, slots)


def expand_rows_(y: Tensor, h: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> None:
    """Do as `torch_kernels.expand_rows_`."""
    if torch.compiler.is_compiling():
        _expand_op(y, h, b, scaling, slots)
    else:
        _expand(y, h, b, scaling, slots)


def _add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor | float, slots: Tensor | None) -> Tensor:
    """Do as `add_rows_`; without slots, use a[0], b[0] and one scaling for every row."""
    (rows, tokens, _), (_, rank, size_in) = x.shape, a.shape
    if rows == 1 and tokens <= MIN_BLOCK_TOKENS and rank <= MAX_FUSED_RANK and rank * size_in <= MAX_FUSED_ENTRIES:
        return _add_few(y, x, a, b, scaling, slots)
    h = _shrink(x, a, slots)
    _expand(y, h, b, scaling, slots)
    return h


def _add_few(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor | float, slots: Tensor | None) -> Tensor:
    """Do as `_add` for one row in one launch: every program computes all of x Aᵀ, and adds to some columns of y."""
    (_, tokens, size_in), (_, size_out, rank) = x.shape, b.shape
    h = torch.empty(1, tokens, rank, dtype=y.dtype, device=y.device)
    block_rank = _clamp_to_power_of_two(rank, 16, MAX_FUSED_RANK)
    block_out = _clamp_to_power_of_two(triton.cdiv(size_out, TARGET_PROGRAMS), 32, 128)
    sizes, strides = (tokens, size_in, size_out, rank), (*y.stride()[1:], *x.stride()[1:], *a.stride(), *b.stride())
    with torch.cuda.device_of(y):
        _add_few_kernel[(triton.cdiv(size_out, block_out),)](
            *(y, x, a, b, h, scaling, slots, *sizes, *strides),
            BLOCK_TOKENS=MIN_BLOCK_TOKENS,
            BLOCK_IN=4096 // block_rank,
            BLOCK_OUT=block_out,
            BLOCK_RANK=block_rank,
            PRECISION=_precision(x),
            num_stages=4,
        )
    return h


def _shrink(x: Tensor, a: Tensor, slots: Tensor | None) -> Tensor:
    """Do as `shrink_rows`; without slots, use a[0] for every row."""
    rows, tokens, _ = x.shape
    few = tokens < MIN_BLOCK_TOKENS or rows * tokens <= 4 * MIN_BLOCK_TOKENS
    return _shrink_tokens(x, a, slots) if few else _shrink_tiles(x, a, slots)


def _shrink_tokens(x: Tensor, a: Tensor, slots: Tensor | None) -> Tensor:
    """Shrink with one program per token and a few ranks: enough programs even for one token, none with empty rows."""
    (rows, tokens, size_in), rank = x.shape, a.shape[1]
    h = torch.empty(rows, tokens, rank, dtype=x.dtype, device=x.device)
    block_rank = _clamp_to_power_of_two(rows * tokens * rank // TARGET_PROGRAMS, 1, 4)
    with torch.cuda.device_of(x):
        _shrink_tokens_kernel[(rows * tokens, triton.cdiv(rank, block_rank))](
            *(x, a, h, slots, tokens, size_in, rank, *x.stride(), *a.stride()),
            BLOCK_IN=_clamp_to_power_of_two(size_in, 128, 4096 // block_rank),
            BLOCK_RANK=block_rank,
        )
    return h


def _shrink_tiles(x: Tensor, a: Tensor, slots: Tensor | None) -> Tensor:
    """Shrink with one program per tile of tokens and ranks; where these are few, several share the sum over `in`."""
    (rows, tokens, size_in), rank = x.shape, a.shape[1]
    block_tokens = 64 if rows * tokens >= 32 * TARGET_PROGRAMS else MIN_BLOCK_TOKENS
    block_rank = _clamp_to_power_of_two(rank, 16, 64)
    block_in = 128 if x.itemsize < 4 and block_rank < 64 else 64
    tiles, ranks = rows * triton.cdiv(tokens, block_tokens), triton.cdiv(rank, block_rank)
    splits = min(max(TARGET_PROGRAMS // (tiles * ranks), 1), 16, triton.cdiv(size_in, 4 * block_in))
    per_split = triton.cdiv(size_in, splits * block_in) * block_in
    h = torch.empty(splits, rows, tokens, rank, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _shrink_tiles_kernel[(tiles, ranks, splits)](
            *(x, a, h, slots, rows, tokens, size_in, rank, per_split, *x.stride(), *a.stride()),
            BLOCK_TOKENS=block_tokens,
            BLOCK_IN=block_in,
            BLOCK_RANK=block_rank,
            PRECISION=_precision(x),
        )
    return h[0] if splits == 1 else h.sum(0).to(x.dtype)


def _expand(y: Tensor, h: Tensor, b: Tensor, scaling: Tensor | float, slots: Tensor | None) -> None:
    """Do as `expand_rows_`; without slots, use b[0] and one scaling for every row."""
    (rows, tokens, size_out), rank = y.shape, b.shape[2]
    block_tokens, block_out = (64, 128) if tokens > 4 * MIN_BLOCK_TOKENS else (MIN_BLOCK_TOKENS, 64)
    with torch.cuda.device_of(y):
        _expand_kernel[(rows * triton.cdiv(tokens, block_tokens), triton.cdiv(size_out, block_out))](
            *(y, h, b, scaling, slots, tokens, size_out, rank, *y.stride(), *h.stride(), *b.stride()),
            BLOCK_TOKENS=block_tokens,
            BLOCK_OUT=block_out,
            BLOCK_RANK=_clamp_to_power_of_two(rank, 16, 64),
            PRECISION=_precision(y),
            num_stages=2,
        )


def _clamp_to_power_of_two(size: int, least: int, most: int) -> int:
    return min(max(int(triton.next_power_of_2(size)), least), most)


def _precision(x: Tensor) -> str:
    """Return the precision of fp32 products: that of torch's own."""
    allowed = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


# For torch.compile: the same functions as opaque operators, with the shapes that the compiler needs.


@torch.library.custom_op("lora_kit::add_", mutates_args=("y",))
def _add_op(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return add_(y, x, a, b, scaling)


_add_op.register_fake(lambda y, x, a, b, scaling: y.new_empty(y.shape[0], a.shape[0]))


@torch.library.custom_op("lora_kit::add_rows_", mutates_args=("y",))
def _add_rows_op(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    return _add(y, x, a, b, scaling, slots)


_add_rows_op.register_fake(lambda y, x, a, b, scaling, slots: y.new_empty(*y.shape[:2], a.shape[1]))


@torch.library.custom_op("lora_kit::shrink_rows", mutates_args=())
def _shrink_op(x: Tensor, a: Tensor, slots: Tensor) -> Tensor:
    return _shrink(x, a, slots)


_shrink_op.register_fake(lambda x, a, slots: x.new_empty(*x.shape[:2], a.shape[1]))


@torch.library.custom_op("lora_kit::expand_rows_", mutates_args=("y",))
def _expand_op(y: Tensor, h: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> None:
    _expand(y, h, b, scaling, slots)


# The kernels. Sizes are in the order of the tensors' axes; a stride is named tensor_axis. Offsets along rows and tokens
# are int64, since the activations of a long batch pass 2³¹ entries.

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(p, q, total, PRECISION: tl.constexpr):
    if INTERPRETED:  # its bf16 are integers in disguise, and it would multiply those
        return tl.dot(p.to(tl.float32), q.to(tl.float32), total, input_precision="ieee")
    return tl.dot(p, q, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens"])
def _add_few_kernel(
    y, x, a, b, h, scaling, slots,
    tokens, size_in, size_out, rank,
    y_token, y_out, x_token, x_in, a_slot, a_rank, a_in, b_slot, b_out, b_rank,
    BLOCK_TOKENS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.arange(0, BLOCK_TOKENS).to(tl.int64)[:, None]
    k = tl.arange(0, BLOCK_RANK)
    out = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    slot, stop = 0, size_in
    if slots is not None:
        slot = tl.load(slots)
        stop = tl.where(slot == 0, 0, size_in)
        a += slot * a_slot

    total = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), tl.float32)
    for start in range(0, stop, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        x_ = tl.load(x + token * x_token + i[None, :] * x_in, (token < tokens) & (i[None, :] < size_in), 0.0)
        a_ = tl.load(a + k[None, :] * a_rank + i[:, None] * a_in, (k[None, :] < rank) & (i[:, None] < size_in), 0.0)
        total = _dot(x_, a_.to(x_.dtype), total, PRECISION)
    shrunk = total.to(y.dtype.element_ty)
    if block == 0:
        tl.store(h + token * rank + k[None, :], shrunk, (token < tokens) & (k[None, :] < rank))

    if slots is not None:
        if slot == 0:
            return
        scaling = tl.load(scaling + slot)
        b += slot * b_slot
    b_ = tl.load(b + out[None, :] * b_out + k[:, None] * b_rank, (out[None, :] < size_out) & (k[:, None] < rank), 0.0)
    update = _dot(shrunk, b_.to(shrunk.dtype), tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32), PRECISION)
    at, inside = y + token * y_token + out[None, :] * y_out, (token < tokens) & (out[None, :] < size_out)
    tl.store(at, tl.load(at, inside).to(tl.float32) + scaling * update, inside)


@triton.jit(do_not_specialize=["tokens"])
def _shrink_tokens_kernel(
    x, a, h, slots,
    tokens, size_in, rank,
    x_row, x_token, x_in, a_slot, a_rank, a_in,
    BLOCK_IN: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, token = program // tokens, program % tokens
    k = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    stop = size_in
    if slots is not None:
        slot = tl.load(slots + row)
        stop = tl.where(slot == 0, 0, size_in)
        a += slot * a_slot
    x += row * x_row + token * x_token

    total = tl.zeros((BLOCK_RANK, BLOCK_IN), tl.float32)
    for start in range(0, stop, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        x_ = tl.load(x + i * x_in, i < size_in, 0.0)
        a_ = tl.load(a + k[:, None] * a_rank + i[None, :] * a_in, (k[:, None] < rank) & (i[None, :] < size_in), 0.0)
        total += a_.to(x_.dtype).to(tl.float32) * x_.to(tl.float32)[None, :]
    tl.store(h + program * rank + k, tl.sum(total, 1), k < rank)


@triton.jit(do_not_specialize=["rows", "tokens"])
def _shrink_tiles_kernel(
    x, a, h, slots,
    rows, tokens, size_in, rank, per_split,
    x_row, x_token, x_in, a_slot, a_rank, a_in,
    BLOCK_TOKENS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks, split = tl.cdiv(tokens, BLOCK_TOKENS), tl.program_id(2)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = ((tl.program_id(0) % blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    k = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    first = split * per_split
    stop = tl.minimum(first + per_split, size_in)
    if slots is not None:
        slot = tl.load(slots + row)
        stop = tl.where(slot == 0, first, stop)
        a += slot * a_slot
    x += row * x_row

    total = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), tl.float32)
    for start in range(first, stop, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        x_ = tl.load(x + token * x_token + i[None, :] * x_in, (token < tokens) & (i[None, :] < size_in), 0.0)
        a_ = tl.load(a + k[None, :] * a_rank + i[:, None] * a_in, (k[None, :] < rank) & (i[:, None] < size_in), 0.0)
        total = _dot(x_, a_.to(x_.dtype), total, PRECISION)
    h += ((split * rows + row) * tokens + token) * rank
    tl.store(h + k[None, :], total, (token < tokens) & (k[None, :] < rank))


@triton.jit(do_not_specialize=["tokens"])
def _expand_kernel(
    y, h, b, scaling, slots,
    tokens, size_out, rank,
    y_row, y_token, y_out, h_row, h_token, h_rank, b_slot, b_out, b_rank,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    token = ((tl.program_id(0) % blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    if slots is not None:
        slot = tl.load(slots + row)
        if slot == 0:
            return
        scaling = tl.load(scaling + slot)
        b += slot * b_slot
    h += row * h_row + token * h_token

    update = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        k = start + tl.arange(0, BLOCK_RANK)
        h_ = tl.load(h + k[None, :] * h_rank, (token < tokens) & (k[None, :] < rank), 0.0)
        b_ = tl.load(
            b + out[None, :] * b_out + k[:, None] * b_rank, (out[None, :] < size_out) & (k[:, None] < rank), 0.0
        )
        update = _dot(h_, b_.to(h_.dtype), update, PRECISION)
    at, inside = y + row * y_row + token * y_token + out[None, :] * y_out, (token < tokens) & (out[None, :] < size_out)
    tl.store(at, tl.load(at, inside).to(tl.float32) + scaling * update, inside)
