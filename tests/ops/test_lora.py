"""The operations against the plain equation, their gradients against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_kit.ops.lora import lora_add, lora_add_embedding, lora_add_embedding_rows, lora_add_rows, lora_linear

DTYPES = [torch.float32, torch.bfloat16]


def made(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_(grad)


def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return y + scaling * (x @ a.mT @ b.mT)


def plain_rows(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor) -> Tensor:
    each = len(x) // len(slots)
    rows = slots.repeat_interleave(each)
    return torch.stack([plain(y[i], x[i], a[k], b[k], float(scaling[k])) for i, k in enumerate(rows.tolist())])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    size_in=st.integers(1, 9),
    size_out=st.integers(1, 9),
    rank=st.integers(1, 5),
    scaling=st.floats(-4, 4),
)
def test_lora_add_is_the_equation(shape: list[int], size_in: int, size_out: int, rank: int, scaling: float) -> None:
    y, x = made(*shape, size_out), made(*shape, size_in)
    a, b = made(rank, size_in), made(size_out, rank)
    expected = plain(y, x, a, b, scaling)
    torch.testing.assert_close(lora_add(y.clone(), x, a, b, scaling), expected)


@settings(max_examples=40, deadline=None)
@given(
    slots=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    each=st.integers(1, 2),
    length=st.integers(1, 3),
    rank=st.integers(1, 4),
)
def test_lora_add_rows_is_the_equation_row_by_row(slots: list[int], each: int, length: int, rank: int) -> None:
    n = each * len(slots)
    y, x = made(n, length, 5), made(n, length, 7)
    a, b, scaling, index = made(4, rank, 7), made(4, 5, rank), made(4), torch.tensor(slots)
    scaling[0] = 0  # slot 0 is the base
    expected = plain_rows(y, x, a, b, scaling, index)
    torch.testing.assert_close(lora_add_rows(y.clone(), x, a, b, scaling, index), expected)


def test_gradients_equal_autograd() -> None:
    y, x = made(2, 3, 5, grad=True), made(2, 3, 7, grad=True)
    a, b = made(4, 7, grad=True), made(5, 4, grad=True)
    assert torch.autograd.gradcheck(lambda *t: lora_add(t[0] * 1, *t[1:], 0.7), (y, x, a, b))


def test_gradients_of_rows_equal_autograd() -> None:
    y, x = made(4, 3, 5, grad=True), made(4, 3, 7, grad=True)
    a, b = made(3, 2, 7, grad=True), made(3, 5, 2, grad=True)
    scaling, slots = made(3), torch.tensor([2, 0, 2, 1])
    scaling[0] = 0  # slot 0 is the base
    assert torch.autograd.gradcheck(lambda *t: lora_add_rows(t[0] * 1, *t[1:], scaling, slots), (y, x, a, b))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_the_whole_layer_equal_autograd(dropout: float, *, with_bias: bool, transposed: bool) -> None:
    weight = made(7, 5).mT if transposed else made(5, 7)  # Conv1D keeps its weight as (in, out)
    bias = made(5) if with_bias else None

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(x, weight, bias, a, b, 0.7, dropout=dropout)

    inputs = made(2, 3, 7, grad=True), made(4, 7, grad=True), made(5, 4, grad=True)
    assert torch.autograd.gradcheck(layer, inputs)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_through_layers_that_share_their_input_and_checkpointing_equal_autograd(dropout: float) -> None:
    weights = [made(5, 7, seed=number) for number in range(3)]

    def block(x: Tensor, *factors: Tensor) -> Tensor:
        q, k, v = (
            lora_linear(x, weight, None, a, b, 0.7, dropout=dropout)
            for weight, a, b in zip(weights, factors[::2], factors[1::2], strict=True)
        )
        return q * k + v

    def checkpointed(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        made_: Tensor = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return made_

    pairs = [made(*shape, grad=True, seed=number) for number in range(3) for shape in ((4, 7), (5, 4))]
    assert torch.autograd.gradcheck(checkpointed, (made(2, 7, grad=True), *pairs))


def test_dropout_is_torchs_own_bit_for_bit_forward_and_backward() -> None:
    x, weight = made(6, 7, dtype=torch.float32, grad=True), made(5, 7, dtype=torch.float32)
    a, b = made(4, 7, dtype=torch.float32, grad=True), made(5, 4, dtype=torch.float32, grad=True)
    found = []
    for compute in (
        lambda: lora_linear(x, weight, None, a, b, 2.0, dropout=0.4),
        lambda: lora_add(torch.nn.functional.linear(x, weight), x, a, b, 2.0, dropout=0.4),
        lambda: x @ weight.mT + 2 * (torch.nn.functional.dropout(x, 0.4) @ a.mT @ b.mT),
    ):
        torch.manual_seed(3)
        y = compute()
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b)), torch.rand(1)))
    for values in zip(*found, strict=True):
        for value in values[:-1]:
            torch.testing.assert_close(value, values[-1])


def test_a_dtype_that_the_base_would_refuse_is_refused() -> None:
    a, b = made(2, 7, dtype=torch.float32), made(5, 2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        lora_linear(made(3, 7, dtype=torch.bfloat16), made(5, 7, dtype=torch.float32), None, a, b, 1.0)


@pytest.mark.parametrize("missing", range(4))
def test_gradients_are_right_when_one_input_is_frozen(missing: int) -> None:
    tensors = [made(2, 3, 5), made(2, 3, 7), made(4, 7), made(5, 4)]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index != missing)
    assert torch.autograd.gradcheck(lambda *t: lora_add(t[0] * 1, *t[1:], 0.7), tensors)


def test_a_view_is_not_written_to() -> None:
    whole = made(6, 5)
    kept = whole.clone()
    lora_add(whole[1:3], made(2, 7), made(2, 7), made(5, 2), 1.0)
    lora_add_rows(whole[1:3], made(2, 7), made(1, 2, 7), made(1, 5, 2), torch.ones(1), torch.zeros(1, dtype=torch.long))
    assert torch.equal(whole, kept)


def test_the_result_may_be_changed_in_place() -> None:
    x, a, b = made(2, 7, grad=True), made(3, 7, grad=True), made(5, 3, grad=True)
    linear = torch.nn.Linear(7, 5).double().requires_grad_(False)
    result = lora_add(linear(x), x, a, b, 2.0)
    result += 1
    result.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_factors_compute_in_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    y, x = made(2, 3, 5, dtype=dtype), made(2, 3, 7, dtype=dtype)
    a, b = made(4, 7, dtype=torch.float32, grad=True), made(5, 4, dtype=torch.float32, grad=True)
    result = lora_add(y.clone(), x, a, b, 0.5)
    assert result.dtype == dtype
    result.sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.float32
    torch.testing.assert_close(result, plain(y, x, a.to(dtype), b.to(dtype), 0.5))


def test_autocast_neither_raises_nor_computes_in_the_wrong_dtype() -> None:
    linear = torch.nn.Linear(7, 5)
    x, a, b = made(2, 7, dtype=torch.float32), made(3, 7, dtype=torch.float32), made(5, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
        assert lora_add(y, x, a, b, 1.0).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = lora_add(torch.zeros(2, 5), x, a, b, 1.0)
    torch.testing.assert_close(exact, x @ a.mT @ b.mT)


def test_an_embedding_is_a_one_hot_linear_layer() -> None:
    ids = torch.tensor([[1, 4, 0], [2, 2, 5]])
    one_hot = torch.nn.functional.one_hot(ids, 6).double()
    y, a, b = made(2, 3, 5), made(4, 6), made(5, 4)
    torch.testing.assert_close(lora_add_embedding(y, ids, a, b, 0.5), plain(y, one_hot, a, b, 0.5))
    slabs, scaling, slots = (made(3, 4, 6), made(3, 5, 4)), made(3), torch.tensor([2, 1])
    torch.testing.assert_close(
        lora_add_embedding_rows(y, ids, *slabs, scaling, slots), plain_rows(y, one_hot, *slabs, scaling, slots)
    )
