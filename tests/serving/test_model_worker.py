"""The worker's thread: no failure of one request reaches another, nothing that has ended keeps a slot."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import lora_kit as lk
from lora_kit.adapter.adapter import Adapter
from lora_kit.models.loading import Base
from lora_kit.serving.adapter_slots import AdapterSlots
from lora_kit.serving.engine import Event, Finish
from lora_kit.serving.model_worker import ModelWorker
from lora_kit.serving.rows_engine import RowsEngine
from lora_kit.serving.sampler import SamplingSettings
from lora_kit.serving.tickets import OverloadedError, QueueLimits, Ticket
from tests.support import random_adapters

PROMPT = (40, 41, 42)


@pytest.fixture(scope="module")
def base() -> Base:
    return lk.load_base("kit-base", dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def adapters(base: Base) -> list[Adapter]:
    return [random_adapters.made(base, seed=seed, target_modules=["q_proj"], r=2) for seed in range(4)]


@pytest.fixture
def start(base: Base) -> Iterator[Callable[..., ModelWorker]]:
    running: list[tuple[ModelWorker, lk.AdapterBank]] = []

    def start(*, slots: int = 1, **limits: Any) -> ModelWorker:
        bank = lk.attach(base.model, slots=slots, max_rank=4)
        engine = RowsEngine(base, bank, rows=4)
        worker = ModelWorker(engine, AdapterSlots(bank, engine, slots=slots), limits=QueueLimits(**limits))
        running.append((worker, bank))
        worker.start()
        return worker

    yield start
    for worker, bank in running:
        worker.stop()
        worker.join(timeout=60)
        assert not worker.is_alive()
        bank.detach()


class Client:
    """Asks a worker, and reads the events of its request."""

    def __init__(self, worker: ModelWorker, name: str, adapter: Adapter | None, count: int = 4) -> None:
        self.worker, self.events = worker, queue.SimpleQueue[Event]()
        settings = SamplingSettings(max_tokens=count, ignore_eos=True)
        self.ticket = Ticket(name, PROMPT, settings, adapter, frozenset(), self.events.put)
        self.submitted = worker.submit(self.ticket)

    def finish(self) -> tuple[list[int], Finish]:
        tokens: list[int] = []
        while (event := self.events.get(timeout=60)).finish is None or event.chosen is not None:
            tokens += [event.chosen.token] if event.chosen is not None else []
            if event.finish is not None:
                break
        assert event.finish is not None
        return tokens, event.finish


def count_leases(worker: ModelWorker) -> int:
    return sum(use.leases for use in worker.call(worker.slots.describe).result(timeout=60).values())


def wait_idle(worker: ModelWorker) -> None:
    deadline = time.monotonic() + 60
    while worker._engine.running or worker._engine.waiting or worker._tickets:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_that_waited_too_long_for_a_slot_never_takes_one(
    start: Callable[..., ModelWorker], adapters: list[Adapter]
) -> None:
    worker = start(seconds=0.2)
    first = Client(worker, "a", adapters[0], count=400)
    late = Client(worker, "b", adapters[1])
    reason = late.finish()[1]
    assert reason.reason == "error"
    assert isinstance(reason.error, OverloadedError)
    worker.cancel("a")
    assert first.finish()[1].reason == "cancelled"
    wait_idle(worker)
    assert count_leases(worker) == 0
    assert Client(worker, "c", adapters[2]).finish()[1].reason == "length"


def test_a_request_that_is_cancelled_while_it_waits_for_a_slot_ends_at_once(
    start: Callable[..., ModelWorker], adapters: list[Adapter]
) -> None:
    worker = start()
    first, second = Client(worker, "a", adapters[0], count=400), Client(worker, "b", adapters[1])
    worker.cancel("b")
    assert second.finish()[1].reason == "cancelled"
    worker.cancel("a")
    first.finish()
    assert count_leases(worker) == 0


def test_the_base_never_waits_behind_an_adapter_that_waits_for_a_slot(
    start: Callable[..., ModelWorker], adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_kit.serving.model_worker._PATIENCE_SECONDS", 0.0)
    worker = start()
    first, second = Client(worker, "a", adapters[0], count=400), Client(worker, "b", adapters[1])
    second.submitted.result(timeout=20)
    assert len(Client(worker, "c", None).finish()[0]) == 4
    assert second.events.empty()
    for client in (first, second):
        worker.cancel(client.ticket.request_id)
        client.finish()


def test_an_adapter_that_fails_to_load_after_a_wait_ends_its_own_request(
    start: Callable[..., ModelWorker], adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start()
    first, second = Client(worker, "a", adapters[0], count=40), Client(worker, "b", adapters[1])
    second.submitted.result(timeout=60)

    def fail(adapter: Adapter) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr(worker.slots, "_give_slot", fail)
    assert "planted" in second.finish()[1].message
    monkeypatch.undo()
    assert len(first.finish()[0]) == 40
    assert worker.is_alive()
    assert count_leases(worker) == 0


def test_a_step_that_fails_outside_of_a_forward_ends_what_runs_and_no_more(
    start: Callable[..., ModelWorker], adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(slots=2)
    alone = Client(worker, "a", adapters[0]).finish()[0]

    def fail(*arguments: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(worker._engine, "_take_logits", fail)
    assert "planted" in Client(worker, "b", adapters[1]).finish()[1].message
    monkeypatch.undo()
    wait_idle(worker)
    assert count_leases(worker) == 0
    assert Client(worker, "c", adapters[0]).finish()[0] == alone


def test_a_sink_that_raises_ends_its_own_request(start: Callable[..., ModelWorker], adapters: list[Adapter]) -> None:
    worker = start(slots=2)

    def fail(event: Event) -> None:
        raise RuntimeError("the client's loop is closed")

    settings = SamplingSettings(max_tokens=400, ignore_eos=True)
    worker.submit(Ticket("a", PROMPT, settings, adapters[0], frozenset(), fail)).result(timeout=60)
    assert len(Client(worker, "b", adapters[1]).finish()[0]) == 4
    wait_idle(worker)
    assert count_leases(worker) == 0
    assert worker.counts.new_tokens < 100


def test_who_comes_after_the_end_is_told(start: Callable[..., ModelWorker]) -> None:
    worker = start()
    worker.stop()
    worker.join(timeout=60)
    with pytest.raises(OverloadedError, match="ends"):
        worker.submit(Ticket("a", PROMPT, SamplingSettings(), None, frozenset(), print)).result(timeout=60)


def test_a_stuck_command_is_seen(start: Callable[..., ModelWorker]) -> None:
    worker, began, go_on = start(), threading.Event(), threading.Event()
    waiting = worker.call(lambda: (began.set(), go_on.wait(60)))
    assert began.wait(60)
    time.sleep(0.2)
    assert worker.stuck_seconds > 0.1
    go_on.set()
    waiting.result(timeout=60)
    wait_idle(worker)
    assert worker.stuck_seconds < 0.1


def test_a_storm_over_fewer_slots_gives_everybody_their_own_answer(
    start: Callable[..., ModelWorker], adapters: list[Adapter]
) -> None:
    worker = start(slots=2)
    choices: list[Adapter | None] = [None, *adapters]
    alone = [Client(worker, f"alone-{n}", adapter, count=8).finish()[0] for n, adapter in enumerate(choices)]
    assert len({tuple(tokens) for tokens in alone}) > 2

    def ask(number: int) -> bool:
        client = Client(worker, f"storm-{number}", choices[number % 5], count=8)
        if number % 4 == 0:
            worker.cancel(client.ticket.request_id)
        tokens, finish = client.finish()
        whole = alone[number % 5]
        return tokens == whole if finish.reason == "length" else tokens == whole[: len(tokens)] and number % 4 == 0

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(60)))
    wait_idle(worker)
    assert count_leases(worker) == 0
    assert len(worker._engine._free) == 4  # type: ignore[attr-defined]
