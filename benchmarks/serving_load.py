"""How much does it cost to answer with many adapters at once?

64 requests of mixed length, 32 at once, 8 adapters of rank 8 on every linear layer and the base, through the server's
engine: new tokens per CPU second of the whole process. Beside it the base alone in the same engine; the base's
requests with a bank attached; `generate` with `bank.rows` in batches of 16; PEFT with `adapter_names` in batches of
16; PEFT with `set_adapter`, one request after the other. And 1,000 adapters offered over 8 slots, asked as often as
Zipf's law has it, beside 8 that stay in their slots. Cases take turns within a round, and a ratio is taken within its
round.
"""

from __future__ import annotations

import queue
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

import lora_kit as lk
from benchmarks.harness import quartiles
from benchmarks.models import in_peft, llama
from benchmarks.serving_models import BASE, Ask, adapter, asks, load
from lora_kit.models.loading import Base
from lora_kit.serving.adapter_labels import AdapterLabels
from lora_kit.serving.adapter_slots import AdapterSlots, SlotUse
from lora_kit.serving.engine import EngineRequest, Event
from lora_kit.serving.model_worker import ModelWorker
from lora_kit.serving.rows_engine import RowsEngine
from lora_kit.serving.sampler import SamplingSettings
from lora_kit.serving.tickets import QueueLimits, Ticket

AIMS: Final = {
    "8 adapters + base / base alone": 0.85,
    "base requests with a bank / base alone": 0.95,
    "8 adapters + base / generate with bank.rows": 1.4,
    "8 adapters + base / PEFT adapter_names": 2.5,
    "8 adapters + base / PEFT set_adapter": 6.0,
    "1,000 offered, 8 slots, Zipf / 8 resident": 0.7,
}
BATCH: Final = 16
NAMES: Final = tuple(f"a{number}" for number in range(8))


class Engines:
    """The same requests, answered in different ways.

    Args:
        base: in fp32.
        values: adapters of rank 8 on every linear layer, by name.
        requests: what is asked.
    """

    def __init__(self, base: Base, values: dict[str, lk.Adapter], requests: Sequence[Ask]) -> None:
        self.base, self.values, self.requests = base, values, requests

    def bank(self) -> lk.AdapterBank:
        bank = lk.attach(self.base.model, slots=len(self.values), max_rank=8)
        for name, value in self.values.items():
            bank.load(name, value)
        return bank

    def own(self, *, has_bank: bool, mixed: bool) -> Callable[[], list[list[int]]]:
        """Return what answers everything in our engine."""
        bank = self.bank() if has_bank else None
        engine = RowsEngine(self.base, bank, rows=32, reuse_prefixes=False)
        leases = {name: bank.lease(name) for name in self.values} if bank is not None and mixed else {}

        def run() -> list[list[int]]:
            tokens: dict[str, list[int]] = {}
            for number, each in enumerate(self.requests):
                settings = SamplingSettings(max_tokens=each.new_tokens, ignore_eos=True)
                engine.submit(EngineRequest(str(number), each.prompt, settings, leases.get(each.model)))
            while engine.running or engine.waiting:
                for event in engine.step():
                    if event.chosen is not None:
                        tokens.setdefault(event.request_id, []).append(event.chosen.token)
            return [tokens[str(number)] for number in range(len(self.requests))]

        def close() -> None:
            for lease in leases.values():
                lease.release()
            engine.close()
            if bank is not None:
                bank.detach()

        run.close = close  # type: ignore[attr-defined]
        return run

    def generate(self, model: Any, **options: Any) -> None:
        """Answer in batches, each as long as its longest answer."""
        for start in range(0, len(self.requests), BATCH):
            batch = self.requests[start : start + BATCH]
            self.batch(model, batch, **{key: value(batch) for key, value in options.items()})

    @torch.inference_mode()
    def batch(self, model: Any, batch: Sequence[Ask], **options: Any) -> None:
        longest, most = max(len(each.prompt) for each in batch), max(each.new_tokens for each in batch)
        ids = torch.tensor([[0] * (longest - len(each.prompt)) + list(each.prompt) for each in batch])
        mask = torch.tensor([[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in batch])
        model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most, min_new_tokens=most, **options
        )


def load_wide() -> Base:
    """A Llama of width 512 with 8 layers, in which an adapter is a smaller part of the work than in `kit-base`."""
    return Base(model=llama(), tokenizer=load().tokenizer, name="llama-512")


def measure(rounds: int, *, peft_rounds: int, count: int = 64, base: Base | None = None) -> dict[str, Any]:
    """Tokens per CPU second of each way, and the ratios within rounds: median and quartiles."""
    base = base or load()
    values = {name: adapter(base, seed, r=8) for seed, name in enumerate(NAMES)}
    requests = asks(base, [BASE, *NAMES], count)
    engines = Engines(base, values, requests)
    total = sum(each.new_tokens for each in requests)
    speeds: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, speed in one_round(engines, total, number, with_peft=number < peft_rounds).items():
            speeds.setdefault(name, []).append(speed)
    return {"tokens_per_cpu_second": {name: quartiles(each) for name, each in speeds.items()}, "ratios": ratios(speeds)}


def one_round(engines: Engines, total: int, number: int, *, with_peft: bool) -> dict[str, float]:
    """Each way once, after a warm-up of its own; the order turns round every other round."""
    speeds = {}
    ways = (("base alone", 0, 0), ("base with a bank", 1, 0), ("8 adapters + base", 1, 1))
    for name, has_bank, mixed in ways[:: -1 if number % 2 else 1]:
        run = engines.own(has_bank=bool(has_bank), mixed=bool(mixed))
        run()
        speeds[name] = total / cpu_seconds(run)
        run.close()  # type: ignore[attr-defined]
    if with_peft:
        bank = engines.bank()
        speeds["generate with bank.rows"] = total / cpu_seconds(partial(with_rows, engines, bank))
        bank.detach()
        speeds |= {name: total / seconds for name, seconds in in_peft_ways(engines).items()}
    return speeds


def with_rows(engines: Engines, bank: lk.AdapterBank) -> None:
    for start in range(0, len(engines.requests), BATCH):
        batch = engines.requests[start : start + BATCH]
        with bank.rows([None if each.model == BASE else each.model for each in batch]):
            engines.batch(engines.base.model, batch)


def in_peft_ways(engines: Engines) -> dict[str, float]:
    """CPU seconds of PEFT's two ways; the model is its own copy."""
    model = in_peft(load().model, engines.values).eval()

    def by_names() -> None:
        engines.generate(model, adapter_names=lambda batch: [each.model.replace(BASE, "__base__") for each in batch])

    def one_by_one() -> None:
        for each in engines.requests:
            if each.model == BASE:
                with model.disable_adapter():
                    engines.batch(model, [each])
            else:
                model.set_adapter(each.model)
                engines.batch(model, [each])

    return {"PEFT adapter_names": cpu_seconds(by_names), "PEFT set_adapter": cpu_seconds(one_by_one)}


def ratios(speeds: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Quartiles of the ratios within rounds."""
    mixed, alone = speeds["8 adapters + base"], speeds["base alone"]
    found = {
        "8 adapters + base / base alone": (mixed, alone),
        "base requests with a bank / base alone": (speeds["base with a bank"], alone),
    }
    for way in ("generate with bank.rows", "PEFT adapter_names", "PEFT set_adapter"):
        if way in speeds:
            found[f"8 adapters + base / {way}"] = (mixed, speeds[way])
    return {
        name: quartiles([own / other for own, other in zip(ours, theirs, strict=False)])
        for name, (ours, theirs) in found.items()
    }


def cpu_seconds(run: Callable[[], Any]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


# Many more adapters than slots


def measure_zipf(rounds: int, *, offered: int = 1000, count: int = 256, exponent: float = 1.0) -> dict[str, Any]:
    """New tokens per CPU second over `offered` adapters in 8 slots, beside 8 adapters in 8 slots."""
    base = load()
    with tempfile.TemporaryDirectory() as place:
        store = Path(place)
        values = [adapter(base, seed, r=8) for seed in range(8)]
        for number in range(offered):
            value = values[number % 8]
            tensors = {key: tensor * (1 + number / offered) for key, tensor in value.tensors.items()}
            lk.Adapter(value.config, tensors).save(store / f"a{number}")
        speeds: dict[str, list[float]] = {"resident": [], "offered": []}
        together: dict[str, list[float]] = {"resident": [], "offered": []}
        loads = []
        for number in range(rounds):
            order = list(speeds)[:: -1 if number % 2 else 1]
            for name in order:
                adapters = 8 if name == "resident" else offered
                speed, loaded, tokens = zipf_round(base, store, adapters, count, exponent, number)
                speeds[name].append(speed)
                together[name].append(tokens)
                loads += [loaded] if name == "offered" else []
    ratio = quartiles([own / other for own, other in zip(speeds["offered"], speeds["resident"], strict=True)])
    return {
        "tokens_per_cpu_second": {name: quartiles(each) for name, each in speeds.items()},
        "loads_per_request": sum(loads) / len(loads) / count,
        "new_tokens_per_step": {name: quartiles(each) for name, each in together.items()},
        "ratios": {"1,000 offered, 8 slots, Zipf / 8 resident": ratio},
    }


class CountingEngine(RowsEngine):
    """An engine that counts its steps.

    Attributes:
        steps: so far.
    """

    steps = 0

    def step(self) -> list[Event]:
        self.steps += bool(self.running or self.waiting)
        return super().step()


class CountingSlots(AdapterSlots):
    """Slots that count how many adapters were put into them.

    Attributes:
        loads: so far.
    """

    loads = 0

    def _give_slot(self, adapter: lk.Adapter) -> SlotUse:
        was_there = adapter.digest in self
        use = super()._give_slot(adapter)  # an adapter for which no slot is free is not put into one
        self.loads += not was_there
        return use


def warm_slot(slots: AdapterSlots, value: lk.Adapter) -> None:
    """Put an adapter into a slot."""
    slots.release(slots.lease(value))


def zipf_round(
    base: Base, store: Path, adapters: int, count: int, exponent: float, seed: int
) -> tuple[float, int, float]:
    """New tokens per CPU second, how many adapters were put into slots, and new tokens per step of the engine.

    With eight slots no more than eight adapters are computed at once; a step of few tokens costs nearly as much as one
    of many.
    """
    generator = random.Random(seed)
    weights = [1 / (number + 1) ** exponent for number in range(adapters)]
    names = generator.choices([f"a{number}" for number in range(adapters)], weights, k=count)
    requests = asks(base, names, count, seed=seed)
    bank = lk.attach(base.model, slots=8, max_rank=8)
    engine = CountingEngine(base, bank, rows=32)
    slots, labels = CountingSlots(bank, engine, slots=8), AdapterLabels(store, base_name=BASE)
    worker = ModelWorker(engine, slots, limits=QueueLimits(requests=count, tokens=10**9, seconds=3600))
    worker.start()
    for number in range(8):
        worker.call(partial(warm_slot, slots, labels.resolve(f"a{number}"))).result()
    slots.loads = 0
    seconds = cpu_seconds(partial(ask_all, worker, labels, requests))
    worker.stop()
    worker.join()
    bank.detach()
    total = sum(each.new_tokens for each in requests)
    return total / seconds, slots.loads, total / engine.steps


def ask_all(worker: ModelWorker, labels: AdapterLabels, requests: Sequence[Ask], *, together: int = 32) -> None:
    """Keep so many requests on their way until all are answered."""
    events = queue.SimpleQueue[Event]()
    left, on_their_way = iter(enumerate(requests)), 0
    while True:
        while on_their_way < together and (item := next(left, None)) is not None:
            number, each = item
            settings = SamplingSettings(max_tokens=each.new_tokens, ignore_eos=True)
            own = labels.resolve(each.model)
            worker.submit(Ticket(str(number), each.prompt, settings, own, frozenset(), events.put)).result()
            on_their_way += 1
        if not on_their_way:
            return
        event = events.get()
        if event.finish is not None:
            assert event.finish.reason == "length", event.finish
            on_their_way -= 1
