"""Threads and tasks that use one bank at once: each routes for itself, and loads and unloads meanwhile are safe."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.errors import BankError, LoraKitError
from tests.support import tiny

LONG = pytest.mark.skipif(os.environ.get("LORA_KIT_LONG") != "1", reason="takes minutes; LORA_KIT_LONG=1 runs it")

NAMES = ("a", "b", "c", "head", "dora")


def adapters() -> dict[str, lk.Adapter]:
    """Adapters of every kind, each of which changes the outputs of the tiny Llama."""
    bank = lk.attach(tiny.llama(), dtype=torch.float32)
    bank.add("a", lk.LoraConfig(r=4, init_lora_weights=False))
    bank.add("b", lk.LoraConfig(r=2, target_modules=["q_proj", "lm_head", "embed_tokens"], init_lora_weights=False))
    bank.add("c", lk.LoraConfig(r=6, target_modules=["down_proj"], init_lora_weights=False))
    bank.add("head", lk.LoraConfig(target_modules=[], modules_to_save=["model.norm"]))
    bank.add("dora", lk.LoraConfig(r=3, target_modules=["up_proj"], use_dora=True, init_lora_weights=False))
    with torch.no_grad():
        for parameter in [*bank.parameters("head"), *bank.parameters("dora")]:
            parameter.mul_(1.7)
    return {name: bank.snapshot(name) for name in NAMES}


def logits_alone(values: dict[str, lk.Adapter], ids: Tensor) -> dict[str | None, Tensor]:
    """What each adapter gives in a bank of its own."""
    alone: dict[str | None, Tensor] = {None: tiny.logits(tiny.llama(), {"input_ids": ids})}
    for name, value in values.items():
        model = tiny.llama()
        bank = lk.attach(model)
        bank.load("x", value)
        bank.use("x")
        alone[name] = tiny.logits(model, {"input_ids": ids})
    return alone


def filled(values: dict[str, lk.Adapter], **options: Any) -> tuple[nn.Module, lk.AdapterBank]:
    model = tiny.llama()
    bank = lk.attach(model, **options)
    for name, value in values.items():
        bank.load(name, value)
    return model, bank


def run_in_threads(count: int, work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work, number) for number in range(count)]:
            future.result()


class Storm:
    """Random work of several threads on one bank, every result compared with the adapter alone."""

    def __init__(self) -> None:
        self.values = adapters()
        self.ids = tiny.batch(rows=1)["input_ids"]
        self.alone = logits_alone(self.values, self.ids)
        self.model, self.bank = filled(self.values)
        self.compared = 0
        self.inside = threading.local()  # what a hook does in the forwards of a thread
        self.model.model.layers[1].register_forward_pre_hook(lambda *_: self.work_inside())

    def run(self, seed: int, steps: int) -> None:
        """Do so many random steps in one thread."""
        chance = random.Random(seed)
        self.bank.use(None)
        own = f"own{seed}"
        for _ in range(steps):
            name = chance.choice([*NAMES, None])
            kind = chance.choice(["use", "using", "rows", "rows", "nested", "generate", "load", "hook", "blocks"])
            if kind == "use":
                self.bank.use(name)
                self.check([name])
            elif kind == "using":
                with self.bank.using(name):
                    self.check([name])
            elif kind == "rows":
                self.check_rows([chance.choice([*NAMES, None]) for _ in range(chance.randint(1, 5))])
            elif kind == "nested":
                with self.bank.using(name):
                    self.check_rows([chance.choice(NAMES), None])
                    self.check([name])
            elif kind == "generate":
                self.check_generation(name)
            elif kind == "hook":
                self.check_hook(name, chance.choice([*NAMES, None]))
            elif kind == "blocks":
                self.check_blocks(name, chance.choice([*NAMES, None]))
            else:
                content = chance.choice(NAMES)
                self.bank.load(own, self.values[content])
                with self.bank.rows([own, name]):
                    self.check([content, name])
                self.bank.unload(own)

    def work_inside(self) -> None:
        getattr(self.inside, "work", int)()

    def check_hook(self, name: str | None, other: str | None) -> None:
        """A forward in which something uses another adapter, which the next one then uses."""
        self.bank.use(name)
        self.inside.work = lambda: self.bank.use(other)
        self.check([name])
        self.check([other])
        self.inside.work = int

    def check_blocks(self, name: str | None, other: str | None) -> None:
        """Two blocks, of which the first ends first."""
        blocks = [self.bank.using(name), self.bank.using(other)]
        for block in blocks:
            block.__enter__()
        blocks[0].__exit__(None, None, None)
        self.check([other])
        blocks[1].__exit__(None, None, None)

    def check_rows(self, names: list[str | None]) -> None:
        with self.bank.rows(names):
            assert self.bank.active == (tuple(names) if len(set(names)) > 1 else names[0])
            self.check(names)

    def check(self, names: list[str | None]) -> None:
        found = tiny.logits(self.model, {"input_ids": self.ids.expand(len(names), -1)})
        for row, name in zip(found, names, strict=True):
            torch.testing.assert_close(row, self.alone[name][0], rtol=1e-4, atol=1e-4)
        self.compared += 1

    def check_generation(self, name: str | None) -> None:
        """The first of the tokens that are generated are the likeliest of the adapter alone."""
        with self.bank.rows([name, name]), torch.no_grad():
            found = self.model.generate(self.ids.expand(2, -1), max_new_tokens=2, min_new_tokens=2, do_sample=False)
        first = self.alone[name][0, -1].index_fill(0, torch.tensor([2]), -float("inf")).argmax()
        assert found[:, self.ids.shape[1]].tolist() == [int(first)] * 2
        self.compared += 1


@pytest.mark.parametrize("steps", [15, pytest.param(500, marks=LONG)])
def test_no_result_of_threads_that_work_at_once_is_anothers(steps: int) -> None:
    storm = Storm()
    run_in_threads(8, lambda number: storm.run(number, steps))
    assert storm.compared >= 7 * steps
    assert storm.bank.names == NAMES


def test_tasks_of_one_thread_route_for_themselves() -> None:
    values = adapters()
    ids = tiny.batch(rows=1)["input_ids"]
    alone = logits_alone(values, ids)
    model, bank = filled(values)

    async def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(12):
            names = [chance.choice([*NAMES, None]) for _ in range(3)]
            with bank.rows(names):
                for _ in range(2):
                    await asyncio.sleep(0)
                    in_thread = chance.random() < 0.3
                    inputs = {"input_ids": ids.expand(3, -1)}
                    found = (
                        await asyncio.to_thread(tiny.logits, model, inputs) if in_thread else tiny.logits(model, inputs)
                    )
                    for row, name in zip(found, names, strict=True):
                        torch.testing.assert_close(row, alone[name][0], rtol=1e-4, atol=1e-4)
            bank.use(names[0])
            await asyncio.sleep(0)
            torch.testing.assert_close(tiny.logits(model, {"input_ids": ids}), alone[names[0]], rtol=1e-4, atol=1e-4)

    async def work_together() -> None:
        await asyncio.gather(*(work(seed) for seed in range(6)))

    bank.use("a")
    asyncio.run(work_together())
    assert bank.active == "a"


def test_a_thread_begins_with_the_default_and_keeps_it() -> None:
    _, bank = filled(adapters())
    bank.use("a")
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        seen.append(bank.active)
        begun.set()
        go_on.wait()
        seen.append(bank.active)
        bank.use("c")
        seen.append(bank.active)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    with bank.using("head"):
        bank.use("b")
        go_on.set()
        thread.join()
        assert bank.active == "b"
    assert seen == ["a", "a", "c"]
    assert bank.active == "a"  # a block puts back what was before it
    later: list[Any] = []
    run_in_threads(1, lambda _: later.append(bank.active))
    assert later == ["c"]


def test_a_generation_keeps_the_adapter_that_it_began_with() -> None:
    values = adapters()
    model, bank = filled(values)
    ids = tiny.batch(rows=1)["input_ids"]
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    with bank.using("a"):
        expected = model.generate(ids, **options)
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            bank.use("b")
            with bank.using("c"):
                bank.use(None)

    bank.use("a")
    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(5):
            assert torch.equal(model.generate(ids, **options), expected)
    finally:
        stop.set()
        thread.join()


def test_a_block_may_be_left_in_another_context_than_it_was_entered_in() -> None:
    _, bank = filled(adapters())
    bank.use("a")
    block = bank.using("b")
    block.__enter__()
    run_in_threads(1, lambda _: block.__exit__(None, None, None))
    bank.use("a")
    assert bank.active == "a"
    bank.detach()


def test_threads_that_run_a_compiled_model_have_routes_of_their_own() -> None:
    values = adapters()
    ids = tiny.batch(rows=1)["input_ids"]
    alone = logits_alone(values, ids)
    model, bank = filled({name: values[name] for name in ("a", "b", "c")})
    compiled = torch.compile(model, backend="eager")
    bank.use("a")
    torch.testing.assert_close(tiny.logits(compiled, {"input_ids": ids}), alone["a"], rtol=1e-4, atol=1e-4)

    def work(number: int) -> None:
        torch.testing.assert_close(tiny.logits(compiled, {"input_ids": ids}), alone["a"], rtol=1e-4, atol=1e-4)
        for step in range(9):
            name = ("a", "b", "c", None)[(number + step) % 4]
            with bank.using(name):
                torch.testing.assert_close(tiny.logits(compiled, {"input_ids": ids}), alone[name], rtol=1e-4, atol=1e-4)

    with torch._dynamo.config.patch(error_on_recompile=True):
        run_in_threads(3, work)
    torch.testing.assert_close(tiny.logits(compiled, {"input_ids": ids}), alone["a"], rtol=1e-4, atol=1e-4)


def test_what_another_thread_uses_is_not_unloaded_and_what_it_did_use_is() -> None:
    _, bank = filled(adapters())
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with bank.rows(["a", "b"]):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait()
    for call in (lambda: bank.unload("a"), lambda: bank.unload("b"), bank.detach):
        with pytest.raises(BankError, match=r"in use|leave the block"):
            call()
    leave.set()
    thread.join()
    bank.unload("a")
    bank.unload("b")
    bank.detach()


def test_a_route_that_a_failed_forward_used_is_let_go() -> None:
    model, bank = filled(adapters())
    with pytest.raises(LoraKitError) as kept, bank.rows(["a", "b"]):
        model(**tiny.batch(rows=3))
    bank.unload("a")
    assert kept.value
    gc.collect()


def begin(bank: lk.AdapterBank, values: dict[str, Any]) -> tuple[threading.Thread, threading.Event, list[Any]]:
    """A thread that begins with the default, waits, and computes then."""
    begun, go_on, found = threading.Event(), threading.Event(), list[Any]()

    def work() -> None:
        found.append(bank.active)
        begun.set()
        go_on.wait()
        found.append(tiny.logits(bank.model, values))
        found.append(bank.active)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    return thread, go_on, found


def test_a_thread_that_began_with_an_unloaded_adapter_goes_on_with_it() -> None:
    values = adapters()
    inputs = {"input_ids": tiny.batch(rows=1)["input_ids"]}
    alone = logits_alone(values, inputs["input_ids"])
    model = tiny.llama()
    bank = lk.attach(model, slots=2, max_rank=8)
    bank.load("a", values["a"])
    bank.use("a")
    thread, go_on, found = begin(bank, inputs)
    bank.use(None)
    bank.unload("a")
    assert bank.names == ()
    bank.load("a", values["b"])  # the name is free, the slot is not
    with pytest.raises(BankError, match=r"all 2 are taken by a, a \(unloaded, but a thread"):
        bank.load("c", values["c"])
    with bank.using("a"):
        torch.testing.assert_close(tiny.logits(model, inputs), alone["b"], rtol=1e-4, atol=1e-4)
    go_on.set()
    thread.join()
    assert [found[0], found[2]] == ["a", "a"]
    torch.testing.assert_close(found[1], alone["a"], rtol=1e-4, atol=1e-4)
    bank.load("c", values["c"])
    with bank.using("c"):
        torch.testing.assert_close(tiny.logits(model, inputs), alone["c"], rtol=1e-4, atol=1e-4)


def test_content_that_comes_back_while_its_slot_drains_takes_that_slot() -> None:
    values = adapters()
    bank = lk.attach(tiny.llama(), slots=1, max_rank=8)
    bank.load("a", values["a"])
    lease = bank.lease("a")
    bank.unload("a")
    with pytest.raises(BankError, match="a lease uses it"):
        bank.load("b", values["b"])
    bank.load("again", values["a"])
    assert bank.lease("again").slot == lease.slot
    bank.unload("again")
    lease.release()
    bank.load("b", values["b"])
    assert bank.names == ("b",)


def test_a_leased_slot_keeps_its_adapter_until_it_is_released() -> None:
    values = adapters()
    bank = lk.attach(tiny.llama(), slots=2, max_rank=8)
    bank.load("a", values["a"])
    with bank.lease("a") as lease:
        assert lease.digest == values["a"].digest
        bank.unload("a")
        bank.load("b", values["b"])
        with bank.lease("b") as other:
            assert other.slot != lease.slot
    bank.load("c", values["c"])
    assert bank.lease("c").slot == lease.slot
    trained = lk.attach(tiny.llama(), lk.LoraConfig(r=2), name="t")
    with pytest.raises(BankError, match="trainable"):
        trained.lease("t")
    with pytest.raises(LoraKitError, match="no adapter"):
        bank.lease("absent")


def test_a_merge_waits_for_no_thread_but_leaves_none_with_the_update_twice() -> None:
    values = adapters()
    inputs = {"input_ids": tiny.batch(rows=1)["input_ids"]}
    alone = logits_alone(values, inputs["input_ids"])
    bank = lk.attach(tiny.llama())
    bank.load("a", values["a"])
    bank.use("a")
    thread, go_on, found = begin(bank, inputs)
    bank.merge("a")
    go_on.set()
    thread.join()
    torch.testing.assert_close(found[1], alone["a"], rtol=1e-4, atol=1e-4)
    assert bank.active is None
