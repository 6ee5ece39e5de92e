"""Weights that were changed between a forward and its backward: one error, whatever layer reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_kit as lk
from lora_kit.errors import BankError

MESSAGE = "changed between this forward and its backward"
IDS = torch.arange(6).view(2, 3)
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["lin", "c1"]},
    "dora": {"target_modules": ["lin"], "use_dora": True},
    "convolution": {"target_modules": ["conv"]},
    "embedding": {"target_modules": ["emb"]},
    "whole modules": {"target_modules": ["pre"], "modules_to_save": ["block", "head"]},
    "parameter": {"target_modules": [], "target_parameters": ["lin.weight"]},
    "tokens": {"target_modules": ["pre"], "trainable_token_indices": {"emb": [1, 2]}},
}


class Net(nn.Module):
    """A layer of each kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pre, self.lin, self.c1 = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4), Conv1D(4, 4)
        self.conv, self.head = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.c1(self.lin(self.pre(self.emb(ids))))
        x = self.head(self.block(self.conv(x.mT).mT))
        return x.square().sum()


def make_bank(kind: str) -> lk.AdapterBank:
    torch.manual_seed(0)
    bank = lk.attach(Net(), lk.LoraConfig(r=2, **KINDS[kind]), name="a")
    bank.add("first", lk.LoraConfig(r=2, target_modules=["pre"], init_lora_weights=False))
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter += 0.1
    return bank


def step(bank: lk.AdapterBank) -> None:
    with torch.no_grad():
        for parameter in bank.parameters("a"):
            parameter.add_(1)


CHANGES: dict[str, Callable[[lk.AdapterBank], object]] = {
    "restore": lambda bank: bank.restore("a", bank.snapshot("a")),
    "a step": step,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_through_an_adapter_that_was_changed_is_rejected_by_every_kind_of_layer(
    kind: str, change: str
) -> None:
    bank = make_bank(kind)
    bank.use("a")
    alone = bank.model(IDS)
    with bank.rows(["a", "first"]):
        mixed = bank.model(IDS)
    bank.use("first")
    other = bank.model(IDS)
    CHANGES[change](bank)
    for loss in (alone, mixed):
        with pytest.raises(BankError, match=MESSAGE):
            loss.backward()
    other.backward()  # which reads nothing of what was changed


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"embedding"}))
def test_a_backward_through_a_base_that_was_merged_into_is_rejected_by_every_kind_of_layer(kind: str) -> None:
    bank = make_bank(kind)
    bank.use("first")
    loss = bank.model(IDS)
    bank.merge("a")
    with pytest.raises(BankError, match=MESSAGE):
        loss.backward()
