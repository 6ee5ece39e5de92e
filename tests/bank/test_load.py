"""What loading costs, counted: the same for the second adapter and the sixty-fourth, and nothing where none is."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lora_kit as lk
from lora_kit.errors import TargetError
from lora_kit.layers.slot_layer import SlotLayer
from tests.support import folders, tiny

MANY = 64


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> list[str]:
    """Names of the operations on tensors that a call makes."""
    with _Operations() as seen:
        run()
    return seen.names


def calls(run: Callable[[], Any]) -> int:
    """Functions that a call calls, written in Python or not.

    The garbage collector is off meanwhile: what it frees of other tests runs finalizers, which would be counted.
    """
    count = 0

    def step(_frame: Any, event: str, _given: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(step)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def wrapped(model: torch.nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, SlotLayer)]


def test_a_layer_that_nobody_adapts_is_not_touched() -> None:
    model = tiny.llama()
    modules = dict(model.named_modules())
    bank = lk.attach(model, slots=MANY, max_rank=16)
    assert dict(model.named_modules()) == modules
    bank.offer("later", folders.adapter())
    assert dict(model.named_modules()) == modules
    bank.load("first", folders.adapter(seed=1))
    assert wrapped(model) == list(folders.PATHS)
    others = [path for path in modules if path not in folders.PATHS]
    assert all(model.get_submodule(path) is modules[path] for path in others)


@pytest.mark.parametrize("count", [operations, calls])
def test_a_load_costs_the_same_whatever_is_loaded(count: Callable[..., Any]) -> None:
    bank = lk.attach(tiny.llama(), slots=MANY, max_rank=4)
    costs = []
    for number in range(MANY):
        value = folders.adapter(seed=number)
        costs.append(count(lambda number=number, value=value: bank.load(f"a{number}", value)))
    assert costs[1] == costs[MANY - 1]
    assert costs[1] == costs[MANY // 2]
    assert costs[1]


@pytest.mark.parametrize("count", [operations, calls])
def test_bringing_in_costs_the_same_whatever_is_known(count: Callable[..., Any]) -> None:
    bank = lk.attach(tiny.llama(), slots=MANY, max_rank=4)
    costs = []
    for number in range(MANY):
        bank.offer(f"a{number}", folders.adapter(seed=number))
        costs.append(count(lambda number=number: bank.use(f"a{number}")))
    for number in range(100):
        bank.offer(f"more{number}", folders.adapter(seed=MANY + number))
    bank.unload("a7")
    assert costs[1] == costs[MANY - 1] == count(lambda: bank.use("more50"))


@pytest.mark.parametrize("count", [operations, calls])
def test_slots_that_grow_cost_at_most_three_times_as_much_altogether(count: Callable[..., Any]) -> None:
    grows, fixed = lk.attach(tiny.llama(), max_rank=4), lk.attach(tiny.llama(), slots=MANY, max_rank=4)
    totals = []
    for bank in (grows, fixed):
        total = 0
        for number in range(MANY):
            value = folders.adapter(seed=number)
            found = count(lambda bank=bank, number=number, value=value: bank.load(f"a{number}", value))
            total += found if isinstance(found, int) else len(found)
        totals.append(total)
    assert totals[1] < totals[0] <= 3 * totals[1]


def test_a_swap_is_one_assignment_whatever_is_loaded_and_known() -> None:
    bank = lk.attach(tiny.llama(), slots=MANY, max_rank=4)
    for number in range(2):
        bank.load(f"a{number}", folders.adapter(seed=number))
    few = calls(lambda: bank.use("a0"))
    for number in range(2, MANY):
        (bank.load if number % 2 else bank.offer)(f"a{number}", folders.adapter(seed=number))
    for number in range(MANY):
        bank.use(f"a{number}")
    assert not [name for name in operations(lambda: bank.use("a3")) if name != "fill_"]
    assert calls(lambda: bank.use("a3")) == few
    assert calls(lambda: bank.use("a8")) == few + 1  # which of the offered ones was used last is noted


def test_what_is_refused_half_way_is_not_half_there() -> None:
    """An adapter with pairs in a layer that another saves whole, and in one that nobody covered before."""
    model, inputs = tiny.llama(), tiny.batch()
    plain, modules = tiny.logits(model, inputs), wrapped(model)
    bank = lk.attach(model, dtype=torch.float32)
    bank.add("whole", lk.LoraConfig(target_modules=[], modules_to_save=["lm_head"]))
    with pytest.raises(TargetError, match="replaces the module as a whole, and another has LoRA weights"):
        bank.add("pairs", lk.LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert wrapped(model) == [*modules, "lm_head"]
    bank.load("later", folders.adapter())
    bank.use("later")
    assert not torch.equal(tiny.logits(model, inputs), plain)
    bank.detach()
    assert torch.equal(tiny.logits(model, inputs), plain)


@pytest.mark.parametrize("first", ["whole", "pairs"])
def test_a_module_is_saved_whole_or_carries_pairs_within_it(first: str) -> None:
    bank = lk.attach(tiny.llama(), dtype=torch.float32)
    configs = {
        "whole": lk.LoraConfig(target_modules=[], modules_to_save=["mlp"]),
        "pairs": lk.LoraConfig(target_modules=["up_proj"]),
    }
    bank.add(first, configs.pop(first))
    ((second, config),) = configs.items()
    with pytest.raises(TargetError, match=r"mlp.*up_proj|up_proj.*mlp"):
        bank.add(second, config)
    assert bank.names == (first,)
