"""What may be given for the rows of a batch, what may not, and what a wrong name or count leaves behind."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_kit as lk
from lora_kit.bank import bank as bank_module
from lora_kit.errors import BankError, ConfigError, RoutingError, UnknownAdapterError
from tests.support import tiny

Bench = tuple[nn.Module, lk.AdapterBank, dict[str, Tensor]]


@pytest.fixture
def bench() -> Bench:
    """A model with two adapters, and a batch of three rows."""
    model = tiny.llama()
    bank = lk.attach(model, dtype=torch.float32)
    for name in ("a", "b"):
        bank.add(name, lk.LoraConfig(r=2, init_lora_weights=False))
    return model, bank, tiny.batch()


@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize("names", ["a", "ab", None])
def test_a_batch_of_another_size_is_refused_whoever_the_rows_go_to(bench: Bench, names: str | None, count: int) -> None:
    model, bank, batch = bench
    given = [None if names is None else names[place % len(names)] for place in range(count)]
    with bank.rows(given), pytest.raises(RoutingError, match=f"{count} rows were routed"):
        model(**batch)
    with bank.rows(given), pytest.raises(RoutingError, match=f"{count} rows were routed"):
        model(batch["input_ids"])
    assert bank.active is None
    assert model(**batch).logits.shape[0] == 3


def test_one_adapter_for_all_rows_is_what_using_it_is(bench: Bench) -> None:
    model, bank, batch = bench
    with bank.using("a"):
        alone = model(**batch).logits
    names: Any = (name for name in ("a", "a", "a"))
    with bank.rows(names):
        assert torch.equal(model(**batch).logits, alone)
    bank.detach()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("names", [["a", "a", "a"], ["a", None, "b"]])
def test_only_generation_may_have_several_sequences_of_a_row(bench: Bench, names: list[str | None]) -> None:
    model, bank, batch = bench
    twice = {key: value.repeat_interleave(2, 0) for key, value in batch.items()}
    with bank.rows(names):
        with pytest.raises(RoutingError, match="3 rows were routed, but the model was given a batch of 6"):
            model(**twice)
        with torch.no_grad():
            found = model.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=2, num_return_sequences=2)
        assert found.shape[0] == 6


@pytest.mark.parametrize("names", ["ab", "aa"])
def test_a_block_within_has_rows_of_its_own(bench: Bench, names: str) -> None:
    model, bank, batch = bench
    with bank.rows([*names, "a"]):
        with bank.using("a"):
            assert model(**{key: value[:1] for key, value in batch.items()}).logits.shape[0] == 1
        with pytest.raises(RoutingError):
            model(**{key: value[:1] for key, value in batch.items()})


@pytest.mark.parametrize("names", [[], "a", None, (), 7])
def test_what_is_no_list_of_names_is_refused(bench: Bench, names: Any) -> None:
    _, bank, _ = bench
    with pytest.raises(ConfigError, match="one name"), bank.rows(names):
        pass


@pytest.mark.parametrize("name", [3, b"a", ["a"], {"a": 1}, True, ""])
def test_what_is_no_name_is_unknown_and_changes_nothing(bench: Bench, name: Any) -> None:
    _, bank, _ = bench
    bank.use("b")
    error = UnknownAdapterError if isinstance(name, str) else ConfigError
    with pytest.raises(error):
        bank.use(name)
    with pytest.raises(error), bank.using(name):
        pass
    with pytest.raises(error), bank.rows(["a", name, None]):
        pass
    assert bank.active == "b"
    for bring in (bank.load, bank.offer):
        with pytest.raises(ConfigError, match="5 was given as an adapter"):
            bring("q", 5)  # type: ignore[operator]


def test_a_bank_is_not_detached_inside_a_block_that_it_has_to_leave(bench: Bench) -> None:
    model, bank, batch = bench
    with bank.rows(["a", None, "b"]):
        with pytest.raises(BankError, match="leave"):
            bank.detach()
        assert model(**batch).logits.shape[0] == 3
    bank.detach()


def test_threads_that_load_one_name_at_once_lose_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    source = lk.attach(tiny.llama(), lk.LoraConfig(r=2, init_lora_weights=False), name="a")
    adapter = source.snapshot("a")
    bank = lk.attach(tiny.llama(), slots=2, max_rank=2)
    fitted = bank_module.match_adapter

    def slow(*args: Any, **kwargs: Any) -> Any:
        found = fitted(*args, **kwargs)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(bank_module, "match_adapter", slow)
    refused: list[BankError] = []

    def load() -> None:
        try:
            bank.load("a", adapter)
        except BankError as error:
            refused.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["loaded already" in str(error) for error in refused] == [True, True]
    bank.load("b", adapter)
    bank.unload("a")
    bank.load("c", adapter)
    assert bank.names == ("b", "c")


@pytest.mark.parametrize("room", [{"slots": 0}, {"slots": True}, {"max_rank": -1}, {"max_rank": 8.0}])
def test_room_that_is_no_number_of_adapters_or_ranks_is_refused(room: dict[str, Any]) -> None:
    model = tiny.llama()
    with pytest.raises(ConfigError, match="whole number from 1"):
        lk.attach(model, **room)
    lk.attach(model).detach()
