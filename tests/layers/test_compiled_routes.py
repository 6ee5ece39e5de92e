"""Compiled code that tasks and pools of threads enter uses the route of the one who enters it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk

X = torch.linspace(-1, 1, 16).view(2, 8)


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compile_a_function(model: nn.Module) -> Callable[..., Any]:
    def call(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        return y

    return torch.compile(call, backend="eager")


def compile_parts(model: nn.Module) -> nn.Module:
    for part in model:  # type: ignore[attr-defined]
        part.compile(backend="eager")
    return model


WAYS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "model": lambda model: torch.compile(model, backend="eager"),
    "in place": compile_in_place,
    "function": compile_a_function,
    "parts": compile_parts,
}


def compute(call: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        y: Tensor = call(X)
    return y


@pytest.mark.parametrize("way", WAYS)
def test_tasks_that_take_turns_in_compiled_code_use_their_own_adapters(way: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 4)))
    bank = lk.attach(model, dtype=torch.float32)
    expected: dict[str | None, Tensor] = {}
    for name in ("a", "b", None):
        if name is not None:
            bank.add(name, lk.LoraConfig(r=4, target_modules=r".*\.0", init_lora_weights=False))
        with bank.using(name):
            expected[name] = compute(model)
    compiled = WAYS[way](model)

    async def work(name: str | None) -> None:
        with bank.using(name):
            for _ in range(2):
                await asyncio.sleep(0)
                for found in (compute(compiled), await asyncio.to_thread(compute, compiled)):
                    torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)

    async def work_together() -> None:
        await asyncio.gather(*(work(name) for name in expected))

    asyncio.run(work_together())
    assert not torch.allclose(expected["a"], expected["b"])
