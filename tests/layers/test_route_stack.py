"""Blocks end in any order and in any context, and leave what the others chose."""

from __future__ import annotations

import asyncio
import contextlib
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


def answers(bank: lk.AdapterBank, name: str | None) -> Iterator[object]:
    with bank.using(name):
        while True:
            yield active(bank)


def test_a_block_in_a_generator_is_around_what_the_generator_computes_and_nothing_else(bank: lk.AdapterBank) -> None:
    first, second = answers(bank, "a"), answers(bank, "b")
    seen = [(next(first), active(bank), next(second), active(bank)) for _ in range(2)]
    assert seen == [("a", "c", "b", "c")] * 2
    with bank.using(None):
        assert [next(first), active(bank), next(second), active(bank)] == ["a", None, "b", None]
    bank.use("b")
    assert [next(first), active(bank), next(second), active(bank)] == ["a", "b", "b", "b"]
    for name, generator in (("a", first), ("b", second)):
        with pytest.raises(lk.LoraKitError, match=name):
            bank.unload(name)
        generator.close()
    bank.use("c")
    for name in ("a", "b"):
        bank.unload(name)


@contextlib.contextmanager
def entered(bank: lk.AdapterBank, name: str) -> Iterator[None]:
    with bank.using(name):
        yield


def test_a_context_manager_that_is_made_of_a_generator_is_a_block_of_whoever_enters_it(bank: lk.AdapterBank) -> None:
    with entered(bank, "a"):
        assert active(bank) == "a"
        with contextlib.ExitStack() as stack:
            stack.enter_context(entered(bank, "b"))
            assert active(bank) == "b"
        assert active(bank) == "a"
    assert active(bank) == "c"

    def stream() -> Iterator[object]:
        with entered(bank, "a"):
            yield active(bank)
            yield active(bank)

    assert [(found, active(bank)) for found in stream()] == [("a", "c")] * 2


class Entered:
    """A context manager that goes on with a generator by itself."""

    def __init__(self, generator: Iterator[None]) -> None:
        self.generator = generator

    def __enter__(self) -> None:
        next(self.generator)

    def __exit__(self, *exception: object) -> None:
        self.generator.close()  # type: ignore[attr-defined]


@pytest.fixture
def routed(bank: lk.AdapterBank) -> Iterator[lk.AdapterBank]:
    with bank.using("b"):
        yield bank


def test_so_is_one_of_a_class_and_a_fixture(routed: lk.AdapterBank) -> None:
    assert active(routed) == "b"
    with Entered(steps(routed, "a")):
        assert active(routed) == "a"
    assert active(routed) == "b"


def test_tasks_and_threads_that_a_generator_made_keep_its_block(bank: lk.AdapterBank) -> None:
    async def child() -> object:
        return active(bank)

    async def stream() -> AsyncIterator[list[object]]:
        with bank.using("a"):
            yield [await asyncio.create_task(child()), await asyncio.to_thread(active, bank), await child()]

    async def work() -> list[object]:
        return [(found, active(bank)) async for found in stream()]

    assert asyncio.run(work()) == [(["a", "a", "a"], "c")]


def test_a_generator_that_is_given_up_takes_its_block_away(bank: lk.AdapterBank) -> None:
    def begin() -> None:
        next(steps(bank, "a"))

    begin()
    assert active(bank) == "c"
    bank.unload("a")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_generators_in_one_thread_end_in_either_order(bank: lk.AdapterBank, order: tuple[int, int]) -> None:
    generators = [steps(bank, name) for name in ("a", "b")]
    for each in generators:
        next(each)
    for place in order:
        assert active(bank) == "c"
        generators[place].close()
    assert active(bank) == "c"
    for name in ("a", "b"):
        bank.unload(name)


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

    assert asyncio.run(work()) == ["c", "c"]


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
