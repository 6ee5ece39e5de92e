"""Faults while a bank works, a server answers or a training runs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import lora_kit as lk
from lora_kit.adapter.adapter import Adapter
from lora_kit.errors import AdapterError, BankError, LoraKitError, OutOfMemoryError, StorageError, UnknownAdapterError
from lora_kit.layers.linear import LoraLinear
from lora_kit.training.train import train
from tests.faults.fault import Act, Fault, no_files
from tests.support import folders, tiny
from tests.support.memory import narrow
from tests.support.training import recipe_of

A, B = folders.adapter(seed=1), folders.adapter(seed=2)


def _bank(**how: Any) -> lk.AdapterBank:
    bank = lk.attach(tiny.llama(), **{"slots": 3, "max_rank": 4, **how})
    bank.load("a", A)
    bank.load("b", B)
    return bank


def _logits(bank: lk.AdapterBank, name: str | None) -> torch.Tensor:
    with bank.using(name):
        return tiny.logits(bank.model, tiny.batch())


def _use_unknown(folder: Path) -> None:
    bank = _bank()
    bank.use("a")
    try:
        bank.use("pirat")
    except UnknownAdapterError:
        assert bank.active == "a"
        raise


def _ask_server(folder: Path) -> None:
    """An unknown name is 404 over HTTP, never the base's answer."""
    from starlette.testclient import TestClient

    from lora_kit.serving.http_app import build_app
    from lora_kit.serving.served_model import ServedModel, ServerSettings

    folders.adapter().save(folder / "store" / "a")
    base = str(folder / "base")
    served = ServedModel(ServerSettings(base=base, store=folder / "store", slots=2, max_rank=4, rows=2, dtype="fp32"))
    try:
        with TestClient(build_app(served), base_url="http://127.0.0.1") as client:
            asked = {"prompt": "ab", "max_tokens": 1}
            known = client.post("/v1/completions", json={"model": "a", **asked})
            unknown = client.post("/v1/completions", json={"model": "pirat", **asked})
    finally:
        served.close()
    assert known.status_code == 200, known.text
    assert unknown.status_code == 404, unknown.text


def _unload_while_used(folder: Path) -> None:
    bank = _bank()
    expected = _logits(bank, "a")
    begun, go, found = threading.Event(), threading.Event(), []

    def work() -> None:
        with bank.using("a"):
            begun.set()
            go.wait(20)
            found.append(tiny.logits(bank.model, tiny.batch()))

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(20)
    with contextlib.suppress(BankError):  # it is in use, and says so
        bank.unload("a")
    go.set()
    thread.join(20)
    assert torch.equal(found[0], expected)


def _swap_while_generating(folder: Path) -> None:
    bank = _bank()
    ids = tiny.batch(rows=1)["input_ids"]
    with bank.using("a"):
        expected = bank.model.generate(ids, max_new_tokens=4, do_sample=False)
    calls = []

    def swap(*_: Any) -> None:
        calls.append(threading.Thread(target=bank.use, args=("b",)))
        calls[-1].start()
        calls[-1].join()

    hook = bank.model.model.layers[0].register_forward_hook(swap)
    with bank.using("a"):
        found = bank.model.generate(ids, max_new_tokens=4, do_sample=False)
    hook.remove()
    assert calls
    assert torch.equal(found, expected)


def _same_name_new_content(folder: Path) -> None:
    bank = _bank()
    first = _logits(bank, "a")
    bank.unload("a")
    bank.load("a", B)
    assert not torch.equal(_logits(bank, "a"), first)
    assert torch.equal(_logits(bank, "a"), _logits(bank, "b"))


def _changed_after_offer(folder: Path) -> None:
    bank = lk.attach(tiny.llama(), slots=1)
    bank.offer("x", A.save(folder / "x"))
    B.save(folder / "x", replace=True)
    bank.use("x")


def _out_of_memory_in_load(folder: Path) -> None:
    bank = _bank()
    before = _logits(bank, "a")
    put, calls = LoraLinear.put, iter([None, MemoryError("no memory")])

    def fail(*given: Any) -> None:
        error = next(calls)
        if error is not None:
            raise error
        put(*given)

    try:
        with patch.object(LoraLinear, "put", fail):
            bank.load("c", folders.adapter(seed=3))
    except OutOfMemoryError:
        assert bank.names == ("a", "b")
        assert torch.equal(_logits(bank, "a"), before)
        bank.load("c", folders.adapter(seed=3))
        raise


def _too_large_to_load(folder: Path) -> None:
    with patch("lora_kit.torch_utils.available_memory", lambda: 1_000):
        lk.attach(tiny.llama(), slots=2, max_rank=4).load("a", A)


def _out_of_memory_in_training(folder: Path) -> None:
    report = train(recipe_of(folder, steps=1, train={"save_strategy": "no"}), base=narrow("llama", 2)())
    assert report.micro_batch == 2
    assert Adapter.load(report.out)


def _not_one_row_fits(folder: Path) -> None:
    train(recipe_of(folder, steps=1, train={"save_strategy": "no"}), base=narrow("llama", 0)())


def _bank_after_detach(call: Callable[[lk.AdapterBank], object]) -> Act:
    def act(folder: Path) -> None:
        bank = _bank()
        bank.detach()
        try:
            call(bank)
        except BankError:
            again = lk.attach(bank.model, slots=1)
            again.detach()
            raise

    return act


def _full_bank(folder: Path) -> None:
    _bank(slots=2).load("c", folders.adapter(seed=3))


def _twice_at_once(folder: Path) -> None:
    """Many threads load and unload the same names: none is lost, and no slot leaks."""
    bank = lk.attach(tiny.llama(), slots=4, max_rank=4)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        for _ in range(5):
            try:
                bank.load(f"n{number}", A if number % 2 else B)
                _logits(bank, f"n{number}")
                bank.unload(f"n{number}")
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert bank.names == ()
    for name in "abcd":
        bank.load(name, A)


def _clock_goes_back(folder: Path) -> None:
    """Files of tomorrow and of 1970 are read as any others, and replaced."""
    saved = A.save(folder / "x")
    for moment in (0, 2**33):
        for path in saved.iterdir():
            os.utime(path, (moment, moment))
        assert lk.Adapter.load(saved) == A
    B.save(saved, replace=True)
    assert lk.Adapter.load(saved) == B


def _row(
    name: str, act: Act, says: str = "", *, error: type[LoraKitError] | None = None, make: Act = no_files, **more: Any
) -> Fault:
    return Fault(name=name, make=make, act=act, error=error, says=says, **more)


GENERATE = ("generate", "--base", "base", "--adapter", "pirat", "--prompt", "ab", "--max-new-tokens", "1")
RUNNING: tuple[Fault, ...] = (
    _row("an unknown name", _use_unknown, "pirat", error=UnknownAdapterError, command=GENERATE),
    _row("an unknown name over HTTP", _ask_server, writes=True),
    _row("unloaded while it is used", _unload_while_used),
    _row("swapped while it generates", _swap_while_generating),
    _row("the same name with other content", _same_name_new_content),
    _row(
        "changed after it was offered",
        _changed_after_offer,
        "changed since it was offered",
        error=AdapterError,
        writes=True,
    ),
    _row("memory runs out in a load", _out_of_memory_in_load, error=OutOfMemoryError),
    _row("memory would run out in a load", _too_large_to_load, "slots", error=OutOfMemoryError),
    _row("memory runs out in a training step", _out_of_memory_in_training, writes=True),
    _row("memory runs out with one row", _not_one_row_fits, "one row at once", error=StorageError, writes=True),
    _row("a load into a detached bank", _bank_after_detach(lambda bank: bank.load("c", A)), "detach", error=BankError),
    _row("a use of a detached bank", _bank_after_detach(lambda bank: bank.use("a")), "detach", error=BankError),
    _row("more adapters than slots", _full_bank, "slots", error=BankError),
    _row("loads and unloads of many threads", _twice_at_once),
    _row("a clock that goes back", _clock_goes_back, writes=True),
)
