"""What an adapter costs, counted: operations of a forward, and bytes kept for the backward. No timings."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kit as lk
from tests.support.operations import operations

WIDTH, RANK, ROWS = 512, 16, 32


class Attention(nn.Module):
    """q, k and v, which read the same x."""

    def __init__(self, names: Sequence[str] = ("q", "k", "v"), *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (self.get_submodule(name)(x) for name in self.names)
        return sum(others, first)


def config(r: int = RANK, **more: Any) -> lk.LoraConfig:
    return lk.LoraConfig(r=r, target_modules="all-linear", init_lora_weights=False, **more)


def resident(count: int, ranks: Sequence[int] = (RANK,)) -> tuple[nn.Module, lk.AdapterBank]:
    """A layer with `count` adapters a0, a1, …"""
    model = Attention(("q",))
    maker = lk.attach(copy.deepcopy(model))
    bank = lk.attach(model, slots=count, max_rank=max(ranks))
    for number in range(count):
        maker.add("a", config(r=ranks[number % len(ranks)]))
        bank.load(f"a{number}", maker.snapshot("a"))
        maker.unload("a")
    return model, bank


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_one_adapter_for_all_rows_is_three_operations_a_layer(*, conv1d: bool, grad: bool) -> None:
    layer = transformers.pytorch_utils.Conv1D(WIDTH, WIDTH) if conv1d else nn.Linear(WIDTH, WIDTH)
    model = nn.Sequential(layer)
    lk.attach(model, lk.LoraConfig(r=RANK, target_modules=["0"]))
    with torch.set_grad_enabled(grad):
        assert len(operations(lambda: model(torch.randn(4, 3, WIDTH)))) - 1 <= 3  # randn is one
        model[0].base_layer.register_forward_hook(lambda *_: None)  # a black box now
        assert len(operations(lambda: model(torch.randn(4, 3, WIDTH)))) - 1 <= 4


@pytest.mark.parametrize("length", [1, 5])
def test_the_operations_of_a_mixed_batch_do_not_depend_on_the_number_of_adapters(length: int) -> None:
    model, bank = resident(ROWS)
    x = torch.randn(ROWS, length, WIDTH)
    first, later = [], []
    with torch.no_grad():  # inference mode hides of what an operation is composed
        for count in (1, 8, 32):
            # One name per row; of one adapter alone that is no mixed batch, and takes the way of those.
            names = [f"a{row * 7 % count}" for row in range(ROWS)]
            with bank.rows(names):
                first.append(operations(lambda: model(x)))
                later.append(operations(lambda: model(x)))
    assert len(first[1]) == len(first[2])
    assert [len(names) for names in later] == [3, 3, 3], later


def test_rows_of_the_base_cost_nothing() -> None:
    model, bank = resident(4)
    x = torch.randn(8, 3, WIDTH)
    read: list[int] = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "bmm":
                read.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with torch.inference_mode():
        with bank.rows([None, None, "a0", "a1", None, None, None, None]), Rows():
            model(x)
        assert read == [2]
        read.clear()
        with bank.rows(["a0", None, "a2", None, "a1", None, None, None]), Rows():
            model(x)
        assert read[0] == 3


def test_a_row_of_low_rank_does_not_pay_for_the_highest() -> None:
    model, bank = resident(8, ranks=(64, 4, 4, 4, 4, 4, 4, 4))
    x = torch.randn(8, 2, WIDTH)
    names = [f"a{number}" for number in range(8)]
    work = 0

    class Work(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal work
            if func.overloadpacket.__name__ == "bmm" and args[1].shape[1] == WIDTH:
                work += args[1].shape[0] * args[1].shape[2]
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), bank.rows(names):
        with Work():
            together = model(x)
        alone = []
        for row, name in enumerate(names):
            with bank.using(name):
                alone.append(model(x[row : row + 1]))
    assert work == 64 + 7 * 4
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("names", [("q",), ("q", "k", "v")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_and_little_more_is_kept_for_the_backward(
    dtype: torch.dtype, names: Sequence[str], dropout: float, *, autocast: bool
) -> None:
    model = Attention(names, dtype=dtype).train()
    lk.attach(model, config(lora_dropout=dropout))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Parameters are there anyway; a cast weight is kept by autocast with or without an adapter.
        if not isinstance(tensor, nn.Parameter) and tensor.shape != (WIDTH, WIDTH) and not tensor._is_view():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(4, 128, WIDTH, dtype=dtype, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext(),
    ):
        model(x).sum().backward()
    assert sum(kept.values()) <= 1.1 * math.prod(x.shape) * x.element_size()
    assert sum(kept.values()) > 0
    assert x.grad is not None
