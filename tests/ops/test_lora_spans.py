"""Spans of several adapters: each bit for bit what its tokens give alone, forward and gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_kit.ops.lora import lora_add, lora_linear
from lora_kit.ops.lora_spans import LoraSpan, lora_add_spans, lora_linear_spans

RANKS = (2, 16, 5)
BOUNDS = ((0, 6), (6, 20), (24, 30))
TOKENS, SIZE_IN, SIZE_OUT = 32, 24, 40


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pairs() -> list[tuple[Tensor, Tensor]]:
    return [(made(r, SIZE_IN).requires_grad_(), made(SIZE_OUT, r).requires_grad_()) for r in RANKS]


def compute(spans: Callable[[Tensor], Tensor], x: Tensor, leaves: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the output, and the gradients of x and of all leaves."""
    y = spans(x)
    flat = [leaf for pair in leaves for leaf in pair]
    (y * made(*y.shape, seed=9)).sum().backward()
    return [y.detach(), x.grad, *(leaf.grad for leaf in flat)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("black_box", [False, True])
def test_a_span_gives_the_bits_of_its_tokens_alone(dropout: float, *, black_box: bool) -> None:
    weight, bias, x = made(SIZE_OUT, SIZE_IN), made(SIZE_OUT), made(1, TOKENS, SIZE_IN)
    states = {bounds: torch.Generator().manual_seed(bounds[0]).get_state() for bounds in BOUNDS}

    @contextlib.contextmanager
    def draw(bounds: tuple[int, int]):
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(states[bounds])
            yield

    def together(x: Tensor) -> Tensor:
        spans = [
            LoraSpan(*bounds, a, b, 0.7 + number, dropout, lambda bounds=bounds: draw(bounds))
            for number, (bounds, (a, b)) in enumerate(zip(BOUNDS, own, strict=True))
        ]
        if black_box:
            return lora_add_spans(torch.nn.functional.linear(x.detach(), weight, bias), x, spans)
        return lora_linear_spans(x, weight, bias, spans)

    own = pairs()
    y, dx, *gradients = compute(together, x.clone().requires_grad_(), own)
    for number, (start, end) in enumerate(BOUNDS):
        a, b = pairs()[number]
        part = x[:, start:end].clone().requires_grad_()
        with draw((start, end)):
            if black_box:
                base = torch.nn.functional.linear(part.detach(), weight, bias)
                alone = lora_add(base, part, a, b, 0.7 + number, dropout=dropout)
            else:
                alone = lora_linear(part, weight, bias, a, b, 0.7 + number, dropout=dropout)
        (alone * made(*y.shape, seed=9)[:, start:end]).sum().backward()
        assert torch.equal(y[:, start:end], alone)
        assert torch.equal(dx[:, start:end], part.grad)
        assert torch.equal(gradients[2 * number], a.grad)
        assert torch.equal(gradients[2 * number + 1], b.grad)
    assert torch.equal(y[:, 20:24], torch.nn.functional.linear(x[:, 20:24], weight, bias))


def test_gradients_of_spans_equal_autograd() -> None:
    weight, x = made(5, 7).double(), made(6, 7).double().requires_grad_()
    leaves = [made(2, 7).double(), made(5, 2).double(), made(3, 7).double(), made(5, 3).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(x: Tensor, *pair: Tensor) -> Tensor:
        return lora_linear_spans(x, weight, None, [LoraSpan(0, 2, *pair[:2], 0.7), LoraSpan(3, 6, *pair[2:], -2.0)])

    assert torch.autograd.gradcheck(run, (x, *leaves))


def test_a_leaf_that_is_not_trained_gets_no_gradient() -> None:
    (a, b), (c, d), _ = pairs()
    spans = [LoraSpan(0, 4, a.detach(), b, 1.0), LoraSpan(4, 8, c, d.detach(), 1.0)]
    lora_linear_spans(made(8, SIZE_IN), made(SIZE_OUT, SIZE_IN), None, spans).sum().backward()
    assert a.grad is None
    assert d.grad is None
    assert b.grad is not None
    assert c.grad is not None
