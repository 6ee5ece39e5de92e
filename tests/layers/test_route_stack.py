"""Blocks end in any order and in any context, and leave what the others chose."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import torch

import lora_kit as lk
from tests.support import tiny


@pytest.fixture
def bank() -> lk.AdapterBank:
    bank = lk.attach(tiny.llama(), dtype=torch.float32)
    for name in ("a", "b", "c"):
        bank.add(name, lk.LoraConfig(r=2, init_lora_weights=False))
    bank.use("c")
    return bank


def steps(bank: lk.AdapterBank, name: str) -> Iterator[None]:
    with bank.using(name):
        yield
        yield


def active(bank: lk.AdapterBank) -> object:
    """The adapter by its logits, which has to be the one that the bank says."""
    ids = tiny.batch()["input_ids"]
    found = tiny.logits(bank.model, {"input_ids": ids})
    name = bank.active
    with bank.using(name):  # type: ignore[arg-type]
        assert torch.equal(tiny.logits(bank.model, {"input_ids": ids}), found)
    return name


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_generators_in_one_thread_end_in_either_order(bank: lk.AdapterBank, order: tuple[int, int]) -> None:
    generators = [steps(bank, name) for name in ("a", "b")]
    for each in generators:
        next(each)
    assert active(bank) == "b"
    generators[order[0]].close()
    assert active(bank) == ("b", "a")[order[0]]
    generators[order[1]].close()
    assert active(bank) == "c"
    for name in ("a", "b"):
        bank.unload(name)


def test_use_inside_a_block_is_forgotten_with_it_in_any_order(bank: lk.AdapterBank) -> None:
    first, second = steps(bank, "a"), steps(bank, None)
    next(first)
    next(second)
    bank.use("b")
    first.close()
    assert active(bank) == "b"
    second.close()
    assert active(bank) == "c"


def test_a_generator_that_another_thread_closes_changes_its_own_thread_alone(bank: lk.AdapterBank) -> None:
    generator, seen = steps(bank, "a"), list[object]()
    next(generator)

    def close() -> None:
        bank.use("b")
        generator.close()
        seen.append(active(bank))

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert seen == ["b"]
    assert active(bank) == "c"
    bank.unload("a")


def test_a_generator_that_is_closed_in_a_copied_context_is_closed_where_it_began(bank: lk.AdapterBank) -> None:
    generator = steps(bank, "a")
    next(generator)
    contextvars.copy_context().run(generator.close)
    assert active(bank) == "c"


def test_asynchronous_generators_end_in_any_task(bank: lk.AdapterBank) -> None:
    async def stream(name: str) -> AsyncIterator[None]:
        with bank.using(name):
            yield
            yield

    async def work() -> list[object]:
        first, second = stream("a"), stream("b")
        await anext(first)
        await anext(second)
        await asyncio.create_task(first.aclose())  # type: ignore[attr-defined]
        seen = [active(bank)]
        await second.aclose()  # type: ignore[attr-defined]
        return [*seen, active(bank)]

    assert asyncio.run(work()) == ["b", "c"]


def test_a_task_keeps_the_block_that_it_was_created_in(bank: lk.AdapterBank) -> None:
    async def child(go_on: asyncio.Event) -> object:
        await go_on.wait()
        return active(bank)

    async def work() -> list[object]:
        go_on = asyncio.Event()
        with bank.using("a"):
            task = asyncio.create_task(child(go_on))
        go_on.set()
        return [await task, active(bank)]

    assert asyncio.run(work()) == ["a", "c"]
