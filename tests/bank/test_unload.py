"""An adapter that is unloaded between a forward and its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kit.bank.attach import attach
from lora_kit.config.lora_config import LoraConfig
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
