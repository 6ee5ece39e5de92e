"""Layers that compute with something else than the weight that they hold: adapters work, merges are refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.falcon.modeling_falcon import FalconLinear

import lora_kit as lk

IMAGE, ROWS = torch.randn(2, 4, 6, 6), torch.randn(2, 4)
REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "standardized": (lambda: WeightStandardizedConv2d(4, 4, 3), IMAGE, "computes with something else"),
    "convolution with weight_norm": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        IMAGE,
        "parametrization",
    ),
    "linear with weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), ROWS, "parametrization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_weight_that_is_not_what_the_layer_computes_with_is_not_merged(name: str) -> None:
    make, x, reason = REFUSED[name]
    model = nn.Sequential(OrderedDict(layer=make()))
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), name="a")
    before, state = model(x), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(lk.errors.MergeError, match=reason):
        bank.merge("a")
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_forward_of_its_own_that_is_a_linear_layer_is_merged() -> None:
    model = nn.Sequential(OrderedDict(layer=FalconLinear(4, 4)))
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), name="a")
    before = model(ROWS)
    bank.merge("a")
    torch.testing.assert_close(model(ROWS), before)
