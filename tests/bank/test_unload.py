"""What is unloaded, merged or restored between a forward and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kit.bank.attach import attach
from lora_kit.bank.bank import AdapterBank
from lora_kit.config.lora_config import LoraConfig
from lora_kit.errors import BankError
from tests.support import tiny


def gradients(*, unload: bool, **config: Any) -> list[Tensor | None]:
    """Return the gradients of an adapter, which is replaced by another one before the backward or not."""
    torch.manual_seed(0)
    model = tiny.llama()
    bank = attach(model, dtype=torch.float32)
    for name in ("first", "other"):
        bank.add(name, LoraConfig(r=4, init_lora_weights=False, **config))
    leaves = bank.parameters("first")
    bank.use("first")
    loss = model(**tiny.batch(), use_cache=False).logits.square().mean()
    bank.use(None)
    if unload:
        bank.unload("first")
        bank.add("second", LoraConfig(r=4, init_lora_weights=False, **config))
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "config",
    [{}, {"use_dora": True}, {"trainable_token_indices": (3, 4), "target_modules": ("q_proj",)}],
    ids=["lora", "dora", "tokens"],
)
def test_a_backward_after_unload_is_of_the_adapter_of_its_forward(config: dict[str, Any]) -> None:
    for actual, expected in zip(gradients(unload=True, **config), gradients(unload=False, **config), strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def merge_other(bank: AdapterBank) -> None:
    bank.merge("b")


def restore(bank: AdapterBank) -> None:
    bank.restore("a", bank.snapshot("a"))


def unload_loaded(bank: AdapterBank) -> None:
    bank.unload("loaded")
    bank.load("other", bank.snapshot("b"))


@pytest.mark.parametrize("change", [merge_other, restore, unload_loaded])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_change_of_what_a_backward_needs_is_told_as_such(change: Callable[[AdapterBank], None], by_row: bool) -> None:
    model = tiny.llama()
    bank = attach(model, dtype=torch.float32)
    for name in ("a", "b"):
        bank.add(name, LoraConfig(r=4, init_lora_weights=False))
    used = "loaded" if change is unload_loaded else "a"
    bank.load("loaded", bank.snapshot("a"))
    x = model.get_input_embeddings()(tiny.batch()["input_ids"]).detach().requires_grad_()
    with bank.rows([used, None, used]) if by_row else bank.using(used):
        loss = model(inputs_embeds=x, use_cache=False).logits.square().mean()
    change(bank)
    with pytest.raises(BankError, match="changed between this forward and its backward"):
        loss.backward()
