"""What kernels must do, as checks for any device; a script too, since Triton's interpreter needs its own process.

    TRITON_INTERPRET=1 python -m tests.support.kernels  # every check on the CPU; prints {check: what was wrong, or ""}

Inputs are random and anew for every check. Whatever a kernel writes is poisoned first: memory it allocates holds NaN,
and outputs it adds into lie in a frame that it must leave alone.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from lora_kit.ops import dispatch, torch_kernels

Kernels = dispatch.Kernels
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

BOUND: Final = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}
INTERPRETED_BOUND: Final = {**BOUND, BF16: 2e-2}
"""Error of a row over the norm of a usual row. TF32 products would be off by 3e-4. The interpreter cuts bf16 off where
a device rounds."""


class Given:
    """Random tensors on a device, and how far off the result may be."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device
        self.bound = INTERPRETED_BOUND if device.type == "cpu" else BOUND

    def made(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def slots(self, count: int, of: int) -> Tensor:
        """Repeats, and at least one base where there is room for it."""
        slots = torch.randint(0, of, (count,), generator=self.generator)
        slots[count // 2] = 0 if count > 1 else of - 1
        return slots.to(self.device)

    def agree(self, result: Tensor, expected: Tensor) -> None:
        """Raise unless every row of `result` is near that of `expected` (fp64)."""
        norms = expected.norm(dim=-1)
        worst = float(((result.double() - expected).norm(dim=-1) / norms.clamp_min(float(norms.mean()))).max())
        assert worst <= self.bound[result.dtype], f"relative error {worst:.1e} in {result.dtype}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory comes filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is what makes torch.empty fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def framed(y: Tensor) -> Iterator[Tensor]:
    """A strided view with the values of y; what lies around it must not change."""
    wide = torch.full((*y.shape[:-2], y.shape[-2] + 2, y.shape[-1] + 3), torch.nan, dtype=y.dtype, device=y.device)
    inner = wide[..., 1:-1, 2:-1]
    inner.copy_(y)
    yield inner
    assert int(wide.isnan().sum()) == wide.numel() - y.numel(), "NaN inside the output, or values beside it"


def corner(tensor: Tensor) -> Tensor:
    """The same values as part of something larger, as a trainable slot lies in its slab."""
    wide = tensor.new_full([size + 2 for size in tensor.shape], torch.nan)
    for axis, size in enumerate(tensor.shape):
        wide = wide.narrow(axis, 0, size)
    return wide.copy_(tensor)


def turned(tensor: Tensor) -> Tensor:
    """The same values with the last two axes the other way round in memory, as the gradients take the factors."""
    return tensor.mT.contiguous().mT


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


LAYOUTS: Final = {"": as_it_is, "corner": corner, "turned": turned}


def check_uniform(
    kernels: Kernels, device: torch.device, *, n: int, sizes: tuple[int, int, int], dtypes: str, layout: str = ""
) -> None:
    """y += s (x Aᵀ) Bᵀ and what it returns, against fp64."""
    size_in, rank, size_out = sizes
    of_x, of_factors = DTYPES[dtypes]
    given = Given(n + sum(sizes), device)
    y, x = given.made(n, size_out, dtype=of_x), given.made(n, size_in, dtype=of_x)
    a, b = given.made(rank, size_in, dtype=of_factors), given.made(size_out, rank, dtype=of_factors)
    scaling = 0.7 / size_in**0.5
    with framed(y) as out, poisoned():
        h = kernels.add_(out, x, LAYOUTS[layout](a), LAYOUTS[layout](b), scaling)
        assert h.shape == (n, rank)
        assert h.dtype == of_x
        given.agree(h, x.double() @ a.to(of_x).double().mT)
        given.agree(out, y.double() + scaling * (h.double() @ b.to(of_x).double().mT))


def check_rows(
    kernels: Kernels, device: torch.device, *, rows: int, tokens: int, sizes: tuple[int, int, int], dtypes: str,
    layout: str = "", slots: int = 4,
) -> None:  # fmt: skip
    """yᵢ += s[kᵢ] hᵢ B[kᵢ]ᵀ with hᵢ = xᵢ A[kᵢ]ᵀ, against fp64; rows of the base bit for bit."""
    size_in, rank, size_out = sizes
    of_x, of_factors = DTYPES[dtypes]
    given = Given(rows + tokens + sum(sizes), device)
    y, x = given.made(rows, tokens, size_out, dtype=of_x), given.made(rows, tokens, size_in, dtype=of_x)
    a, b = given.made(slots, rank, size_in, dtype=of_factors), given.made(slots, size_out, rank, dtype=of_factors)
    scaling = given.made(slots, dtype=FP32) / size_in**0.5
    a[0], b[0], scaling[0] = 0, 0, 0
    index = given.slots(rows, slots)
    with framed(y) as out, poisoned():
        h = kernels.shrink_rows(turned(x), LAYOUTS[layout](a), index)
        kernels.expand_rows_(out, turned(h), LAYOUTS[layout](b), scaling, index)
        assert h.dtype == of_x
        given.agree(h, x.double() @ a.to(of_x).double()[index].mT)
        update = h.double() @ b.to(of_x).double()[index].mT
        given.agree(out, y.double() + scaling.double()[index].view(-1, 1, 1) * update)
        assert torch.equal(out[index == 0], y[index == 0]), "a row of the base was changed"
    if rows == 1:  # else `add_rows_` is the two in turn
        with framed(y) as out, poisoned():
            again = kernels.add_rows_(out, turned(x), LAYOUTS[layout](a), LAYOUTS[layout](b), scaling, index)
            given.agree(again, h.double())
            given.agree(out, y.double() + scaling.double()[index].view(-1, 1, 1) * update)


def check_gradients(kernels: Kernels, device: torch.device) -> None:
    """The gradients that autograd gives in fp64, from the same kernels with transposed factors."""
    given = Given(0, device)
    n, size_in, rank, size_out, scaling = 70, 45, 5, 37, 0.3
    x, dy = given.made(n, size_in, dtype=FP32), given.made(n, size_out, dtype=FP32)
    a, b = given.made(rank, size_in, dtype=FP32), given.made(size_out, rank, dtype=FP32)
    exact = x.double().requires_grad_()
    (dx,) = torch.autograd.grad(scaling * (exact @ a.double().mT @ b.double().mT), exact, dy.double())
    ours = torch.zeros_like(x)
    given.agree(kernels.add_(ours, dy, b.mT, a.mT, scaling), dy.double() @ b.double())
    given.agree(ours, dx)

    index, scales = torch.tensor([0, 1], device=device), torch.tensor([0.0, scaling], device=device)
    slab_a, slab_b = torch.stack([torch.zeros_like(a), a]), torch.stack([torch.zeros_like(b), b])
    ours = torch.zeros(2, n // 2, size_in, device=device)
    g = kernels.add_rows_(ours, dy.view(2, n // 2, -1), slab_b.mT, slab_a.mT, scales, index)
    given.agree(g[1], dy.double().view(2, n // 2, -1)[1] @ b.double())
    assert not ours[0].any()
    given.agree(ours[1], dx.view(2, n // 2, -1)[1])


def check_base(kernels: Kernels, device: torch.device) -> None:
    """A batch of which every row uses the base: zeros come back, and y keeps every bit, the sign of a zero too."""
    a, b, scaling = (
        torch.zeros(2, 3, 10, device=device),
        torch.zeros(2, 12, 3, device=device),
        torch.zeros(2, device=device),
    )
    a[1], b[1], scaling[1] = torch.nan, torch.nan, torch.nan
    for rows, tokens in ((1, 1), (3, 1), (2, 30)):
        y = torch.full((rows, tokens, 12), -0.0, device=device)
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        h = kernels.add_rows_(y, torch.ones(rows, tokens, 10, device=device), a, b, scaling, index)
        assert h.shape == (rows, tokens, 3)
        assert not h.any()
        assert not y.any()
        assert kernels is torch_kernels or bool(y.signbit().all())


def check_compiled(kernels: Kernels, device: torch.device) -> None:
    """Under torch.compile, in one graph, the ops do what the functions do."""
    given = Given(1, device)
    y, x = given.made(3, 2, 20, dtype=FP32), given.made(3, 2, 30, dtype=FP32)
    a, b, scaling = given.made(3, 4, 30, dtype=FP32), given.made(3, 20, 4, dtype=FP32), given.made(3, dtype=FP32)
    index = given.slots(3, 3)

    def updated(y: Tensor, x: Tensor, index: Tensor) -> Tensor:
        y, body = y + 1, dispatch.get_kernels(x)
        h = body.shrink_rows(x, a, index)
        body.expand_rows_(y, h, b, scaling, index)
        body.add_rows_(y, x, a, b, scaling, index)
        body.add_(y[0], x[0], a[1], b[1], 0.5)
        return y * 2

    if kernels is not torch_kernels:
        given_to_op = (y, x, a, b, scaling, index)
        torch.library.opcheck(
            torch.ops.lora_kit.add_rows_.default, given_to_op, test_utils=("test_schema", "test_faketensor")
        )
    compiled = torch.compile(updated, backend="aot_eager", fullgraph=True)
    assert dispatch.get_kernels(x) is kernels
    torch.testing.assert_close(compiled(y, x, index), updated(y, x, index))
    torch.testing.assert_close(compiled(y, x, index.flip(0)), updated(y, x, index.flip(0)))


def check_same_bits(kernels: Kernels, device: torch.device) -> None:
    """The same inputs give the same bits, a sum split between programs included."""
    given = Given(2, device)
    x, a, b = (given.made(*shape, dtype=FP32) for shape in ((100, 1500), (8, 1500), (30, 8)))
    first, second = torch.zeros(2, 100, 30, device=device)
    for y in (first, second):
        kernels.add_(y, x, a, b, 1.0)
    assert torch.equal(first, second)


def check_nothing(kernels: Kernels, device: torch.device) -> None:
    """No rows are no error."""
    a, b = torch.ones(2, 5, device=device), torch.ones(7, 2, device=device)
    assert kernels.add_(torch.ones(0, 7, device=device), torch.ones(0, 5, device=device), a, b, 1.0).shape == (0, 2)


DTYPES: Final = {"fp32": (FP32, FP32), "bf16": (BF16, BF16), "bf16, fp32 factors": (BF16, FP32), "fp16": (FP16, FP32)}
UNIFORM: Final[list[dict[str, Any]]] = [
    {"n": 1, "sizes": (200, 1, 150), "dtypes": "fp32"},
    {"n": 1, "sizes": (2100, 80, 70), "dtypes": "bf16, fp32 factors"},  # too large a rank to fuse
    {"n": 5, "sizes": (300, 16, 33), "dtypes": "bf16, fp32 factors", "layout": "corner"},
    {"n": 16, "sizes": (129, 3, 700), "dtypes": "fp16", "layout": "turned"},
    {"n": 16, "sizes": (64, 64, 64), "dtypes": "fp32", "layout": "corner"},
    {"n": 17, "sizes": (200, 8, 130), "dtypes": "fp32"},
    {"n": 65, "sizes": (1500, 8, 100), "dtypes": "fp32", "layout": "turned"},  # the sum over `in` is split
    {"n": 130, "sizes": (1030, 64, 150), "dtypes": "bf16, fp32 factors", "layout": "corner"},
    {"n": 130, "sizes": (100, 70, 150), "dtypes": "bf16"},
    {"n": 4100, "sizes": (50, 16, 20), "dtypes": "bf16, fp32 factors", "layout": "turned"},
]
ROWS: Final[list[dict[str, Any]]] = [
    {"rows": 1, "tokens": 1, "sizes": (200, 1, 150), "dtypes": "fp32"},
    {"rows": 1, "tokens": 7, "sizes": (150, 16, 70), "dtypes": "bf16", "layout": "turned"},
    {"rows": 5, "tokens": 1, "sizes": (150, 16, 300), "dtypes": "bf16"},
    {"rows": 9, "tokens": 1, "sizes": (600, 64, 70), "dtypes": "fp32", "layout": "corner", "slots": 6},
    {"rows": 30, "tokens": 1, "sizes": (40, 3, 50), "dtypes": "bf16, fp32 factors", "slots": 20},
    {"rows": 3, "tokens": 5, "sizes": (129, 8, 65), "dtypes": "fp16", "layout": "turned"},
    {"rows": 5, "tokens": 20, "sizes": (1100, 8, 130), "dtypes": "fp32", "layout": "corner"},
    {"rows": 3, "tokens": 70, "sizes": (100, 70, 50), "dtypes": "bf16, fp32 factors"},
    {"rows": 1, "tokens": 100, "sizes": (60, 16, 60), "dtypes": "bf16"},
    {"rows": 2, "tokens": 2100, "sizes": (70, 3, 40), "dtypes": "fp32", "layout": "turned"},
]


def _named(case: dict[str, Any]) -> str:
    return " ".join(str(value) for value in case.values() if value)


CHECKS: Final[dict[str, Callable[[Kernels, torch.device], None]]] = {
    **{f"uniform {_named(case)}": partial(check_uniform, **case) for case in UNIFORM},
    **{f"rows {_named(case)}": partial(check_rows, **case) for case in ROWS},
    "gradients": check_gradients,
    "base": check_base,
    "compiled": check_compiled,
    "same bits": check_same_bits,
    "nothing": check_nothing,
}


def main() -> None:
    """Every check on the CPU, with the kernels that LORA_KIT_KERNELS asks for."""
    device, wrong = torch.device("cpu"), {}
    kernels = dispatch.choose_kernels(device, FP32)
    for name, check in CHECKS.items():
        try:
            check(kernels, device)
        except Exception:
            wrong[name] = traceback.format_exc()
        else:
            wrong[name] = ""
    print(json.dumps({"kernels": kernels.__name__, "wrong": wrong}))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
