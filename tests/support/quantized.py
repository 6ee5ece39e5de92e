"""A tiny Llama that bitsandbytes can quantize, and how its adapters are tried."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora_kit as lk
from tests.support import tiny

FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}


def llama(*, seed: int = 0) -> transformers.LlamaForCausalLM:
    """One whose rows are whole blocks of 64, without which bitsandbytes itself is wrong on a CPU."""
    config = tiny.llama().config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def trained(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    """Return the losses of some steps."""
    losses = []
    for step in steps:
        inputs = tiny.batch(seed=step % 2)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that both sides train with."""
    return torch.optim.AdamW(parameters, lr=1e-2)


def shaken(bank: lk.AdapterBank, name: str) -> None:
    """Move an adapter's weights by random numbers that depend on its name."""
    torch.manual_seed(len(name))
    with torch.no_grad():
        for parameter in bank.parameters(name):
            parameter.add_(0.05 * torch.randn_like(parameter))


def swaps_and_rows(model: Any, bank: lk.AdapterBank, base: torch.Tensor) -> tuple[str, str]:
    """Adapters `a` and `bb` and the base, one after another and as rows of a batch: two cells of a table.

    Args:
        base: its logits.
    """
    alone: dict[str | None, torch.Tensor] = {None: base}
    for name in ("a", "bb"):
        shaken(bank, name)
        bank.use(name)
        alone[name] = tiny.logits(model, tiny.batch())
        assert (alone[name] - base).abs().max() > 0.1
    for name, expected in alone.items():
        bank.use(name)
        assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    order = ["bb", None, "a"]
    with bank.rows(order):
        mixed = tiny.logits(model, tiny.batch())
    # Where activations are rounded to int8 or bf16, the last bit of a float may tip one of them.
    wanted = torch.stack([alone[name][row] for row, name in enumerate(order)])
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=1e-2)
    return "yes", "yes"
