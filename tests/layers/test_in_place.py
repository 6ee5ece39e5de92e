"""A model may change the output of an adapted layer in place; gradients are those of the same code out of place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_kit as lk

WIDTH = 8


class Block(nn.Module):
    """A layer whose output is changed, in place or not."""

    def __init__(self, layer: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.change = change

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.change(self.layer(x), other)


def _divide_in_place(y: Tensor, other: Tensor) -> Tensor:
    y /= 2.5
    y += other
    return y


CHANGES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu_": (lambda y, _: nn.functional.relu(y, inplace=True), lambda y, _: nn.functional.relu(y)),
    "/= and +=": (_divide_in_place, lambda y, other: y / 2.5 + other),
    "part of it": (lambda y, _: y.index_fill_(0, torch.tensor([0]), 0.0), lambda y, _: torch.cat([y[:1] * 0, y[1:]])),
}
LINEAR = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), LINEAR),
    "linear of a matrix": (lambda: nn.Linear(WIDTH, WIDTH), LINEAR[0]),
    "linear of four dimensions": (lambda: nn.Linear(WIDTH, WIDTH), LINEAR.unsqueeze(1)),
    "linear without bias": (lambda: nn.Linear(WIDTH, WIDTH, bias=False), LINEAR),
    "Conv1D": (lambda: Conv1D(WIDTH, WIDTH), LINEAR),
    "convolution": (lambda: nn.Conv1d(5, 5, 3, padding=1), LINEAR),
    "embedding": (lambda: nn.Embedding(9, WIDTH), torch.arange(6).view(3, 2)),
}
MODES: dict[str, dict[str, Any]] = {"plain": {}, "dropout": {"lora_dropout": 0.3}, "DoRA": {"use_dora": True}}


def _gradients(block: Block, bank: lk.AdapterBank, x: Tensor, rows: list[str | None] | None) -> list[Tensor]:
    """Return the output, and the gradients of x and of both adapters."""
    x = x.clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(0)
    with bank.rows(rows) if rows else bank.using("a"):
        y = block(x, torch.ones(()))
        (y.float() * torch.arange(y.numel()).view(y.shape)).sum().backward()
    leaves = [*bank.parameters("a"), *bank.parameters("b"), *([x] if x.requires_grad else [])]
    found = [y.detach(), *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in leaves)]
    for leaf in leaves:
        leaf.grad = None
    return found


CASES = [
    (name, mode, rows)
    for name, (_, x) in LAYERS.items()
    for mode in (MODES if "linear" in name or name == "Conv1D" else ("plain",))
    for rows in ([None, ["a", None, "b"]] if len(x) == 3 else [None])
]


@pytest.mark.parametrize(("name", "mode", "rows"), CASES)
def test_an_output_may_be_changed_in_place(name: str, mode: str, rows: list[str | None] | None) -> None:
    make, x = LAYERS[name]
    for in_place, out_of_place in CHANGES.values():
        torch.manual_seed(3)
        block = Block(make(), in_place).train()
        bank = lk.attach(block)
        for adapter in ("a", "b"):
            bank.add(adapter, lk.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, **MODES[mode]))
        changed = _gradients(block, bank, x, rows)
        block.change = out_of_place
        for got, expected in zip(changed, _gradients(block, bank, x, rows), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("context", ["autocast", "hook", "frozen input"])
def test_an_output_may_be_changed_in_place_on_every_path(context: str) -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)
    )
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False), name="a")
    if context == "hook":
        for layer in (model[0], model[2]):
            layer.base_layer.register_forward_hook(lambda *_: None)  # a black box now
    x = LINEAR.clone().requires_grad_(context != "frozen input")
    with torch.autocast("cpu", dtype=torch.bfloat16) if context == "autocast" else contextlib.nullcontext():
        model(x).square().sum().backward()
    assert all(leaf.grad is not None for leaf in bank.parameters("a"))


def test_an_adopted_model_may_change_outputs_in_place() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    theirs = copy.deepcopy(model)
    theirs(LINEAR).square().sum().backward()
    expected = [parameter.grad for parameter in theirs.parameters() if parameter.requires_grad]
    bank = lk.adopt(model)
    model(LINEAR).square().sum().backward()
    for leaf, gradient in zip(bank.parameters("default"), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


_TINY = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (
            transformers.DebertaForSequenceClassification,
            transformers.DebertaConfig(
                **_TINY, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16
            ),
        ),
        (
            transformers.LongformerForSequenceClassification,
            transformers.LongformerConfig(**_TINY, attention_window=[4], max_position_embeddings=64, pad_token_id=0),
        ),
    ],
    ids=["DeBERTa", "Longformer"],
)
def test_a_family_that_changes_its_queries_in_place_trains(kind: Any, config: Any) -> None:
    torch.manual_seed(0)
    model = kind(config).train()
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), name="a")
    assert any("query" in target.path or "in_proj" in target.path for target in bank.coverage("a").targets)
    ids = torch.randint(3, 96, (2, 8))
    model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    covered = [leaf for leaf in bank.parameters("a") if leaf.grad is not None and leaf.grad.any()]
    assert len(covered) >= len(bank.parameters("a")) // 2
