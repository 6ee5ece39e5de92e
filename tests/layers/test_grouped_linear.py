"""Linear layers with a block for each group of their input, and other subclasses with a forward of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import lora_kit as lk

GROUPS, SIZE_IN, SIZE_OUT = 4, 6, 20


class Head(nn.Linear):
    """A linear layer that returns two tensors, as routers do."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y.softmax(-1), y


class Model(nn.Module):
    """Layers in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = DeepseekV4GroupedLinear(SIZE_IN, SIZE_OUT, GROUPS)
        self.choose = Head(SIZE_OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.o_proj(x)
        return y


def _attach(**options: Any) -> tuple[Model, lk.AdapterBank]:
    torch.manual_seed(0)
    model = Model()
    config = lk.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False, **options)
    bank = lk.attach(model, config, name="a")
    bank.add("b", config)
    return model, bank


X = torch.randn(3, 5, GROUPS, SIZE_IN, generator=torch.Generator().manual_seed(1))


def test_the_update_is_that_of_the_changed_weight() -> None:
    model, bank = _attach()
    bank.use(None)
    base = model(X)
    bank.use("a")
    live = model(X)
    bank.merge("a")
    assert (live - base).abs().max() > 0.1
    torch.testing.assert_close(model(X), live)


def test_rows_of_a_layer_in_groups_use_their_own_adapters() -> None:
    model, bank = _attach()
    names = ["a", None, "b"]
    with torch.no_grad(), bank.rows(names):
        mixed = model(X)
    for row, name in enumerate(names):
        bank.use(name)
        torch.testing.assert_close(mixed[row], model(X)[row])


@pytest.mark.parametrize("rows", [False, True])
def test_gradients_of_a_layer_in_groups_are_those_of_its_weight(rows: bool) -> None:
    model, bank = _attach()
    a, b = bank.parameters("a")
    weight = model.o_proj.base_layer.weight.detach()
    changed = nn.Parameter(weight + 4 * (b @ a).detach())
    reference = DeepseekV4GroupedLinear(SIZE_IN, SIZE_OUT, GROUPS)
    reference.weight = changed
    reference(X).square().sum().backward()
    assert changed.grad is not None
    with bank.rows(["a"] * 3) if rows else bank.using("a"):
        model(X).square().sum().backward()
    torch.testing.assert_close(a.grad, 4 * b.detach().mT @ changed.grad)
    torch.testing.assert_close(b.grad, 4 * changed.grad @ a.detach().mT)


def test_what_a_layer_in_groups_cannot_have_is_refused() -> None:
    with pytest.raises(lk.errors.TargetError, match="o_proj: DoRA and initializations from the weight"):
        _attach(use_dora=True)


def test_a_linear_layer_that_returns_something_else_is_left_out_or_refused_by_name() -> None:
    model = Model()
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear"), name="a")
    assert [target.path for target in bank.coverage("a").targets] == ["o_proj"]
    bank.detach()
    with pytest.raises(lk.errors.TargetError, match=r"choose: a Head does not map"):
        lk.attach(model, lk.LoraConfig(r=2, target_modules=["choose"]), name="a")
