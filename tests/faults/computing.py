"""Faults of what is computed: whose adapter, whose gradients, on which layer and device."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kit as lk
from lora_kit.errors import BankError, ConfigError, LoraKitError, RoutingError, TargetError, UnknownAdapterError
from lora_kit.merging.merge import merge
from tests.faults.fault import Act, Fault, no_files
from tests.support import folders, merging, tiny

A, B = folders.adapter(seed=1), folders.adapter(seed=2)


def _bank() -> lk.AdapterBank:
    bank = lk.attach(tiny.llama(), slots=2, max_rank=4)
    bank.load("a", A)
    bank.load("b", B)
    return bank


def _alone(bank: lk.AdapterBank) -> dict[str | None, torch.Tensor]:
    found = {}
    for name in ("a", "b", None):
        with bank.using(name):
            found[name] = tiny.logits(bank.model, tiny.batch(rows=2))
    return found


def _threads(folder: Path) -> None:
    bank = _bank()
    alone, wrong = _alone(bank), []

    def work(name: str) -> None:
        for _ in range(10):
            with bank.rows([name, name]):
                found = tiny.logits(bank.model, tiny.batch(rows=2))
            if not torch.allclose(found, alone[name], atol=1e-4):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def _tasks(folder: Path) -> None:
    bank = _bank()
    alone = _alone(bank)

    async def work(name: str | None) -> None:
        with bank.using(name):
            for _ in range(5):
                await asyncio.sleep(0)
                assert torch.equal(tiny.logits(bank.model, tiny.batch(rows=2)), alone[name])

    async def together() -> None:
        await asyncio.gather(*(work(name) for name in ("a", "b", None)))

    asyncio.run(together())


def _gradients(*, checkpointing: bool, reentrant: bool = False) -> list[torch.Tensor]:
    """Gradients of two adapters whose losses are summed, one used after the other."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    bank = lk.attach(layer, dtype=torch.float32)
    for name in ("t1", "t2"):
        bank.add(name, lk.LoraConfig(r=2, target_modules=("0", "1"), init_lora_weights=False))
    x, total = torch.ones(3, 8, requires_grad=True), torch.zeros(())
    for name in ("t1", "t2"):
        bank.use(name)
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointing else layer(x)
        total = total + y.square().mean()
    bank.use(None)
    total.backward()
    return [leaf.grad for name in ("t1", "t2") for leaf in bank.parameters(name)]


def _checkpointing(reentrant: bool) -> Act:
    def act(folder: Path) -> None:
        plain, found = _gradients(checkpointing=False), _gradients(checkpointing=True, reentrant=reentrant)
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(plain, found, strict=True))

    return act


def _dtype(dtype: Any) -> Act:
    return lambda folder: lk.attach(tiny.llama(), dtype=dtype)


def _bank_on_part(folder: Path) -> None:
    bank = _bank()
    lk.attach(bank.model.model)


def _copies(folder: Path) -> None:
    assert pickle.loads(pickle.dumps(A)) == A == copy.deepcopy(A)
    error = pickle.loads(pickle.dumps(UnknownAdapterError("pirat", ["pirate"])))
    assert str(error) == str(UnknownAdapterError("pirat", ["pirate"]))


def _copied_model(folder: Path) -> None:
    bank = _bank()
    plain = _alone(bank)[None]
    again = copy.deepcopy(bank.model)
    assert torch.equal(tiny.logits(again, tiny.batch(rows=2)), plain)


def _too_few_rows(folder: Path) -> None:
    bank = _bank()
    with bank.rows(["a", "b"]):
        tiny.logits(bank.model, tiny.batch(rows=3))


class _Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.q(x)
        y /= 2.5
        y += x
        return nn.functional.relu(y, inplace=True)


def _in_place(folder: Path) -> None:
    model = _Changing()
    bank = lk.attach(model, lk.LoraConfig(r=2, target_modules=("q",), init_lora_weights=False), name="a")
    model(torch.ones(2, 3, 8)).sum().backward()
    assert all(leaf.grad is not None for leaf in bank.parameters("a"))


def _offloaded(folder: Path) -> None:
    model = tiny.llama()
    accelerate.cpu_offload(model, "cpu")
    bank = lk.attach(model, slots=1)
    bank.load("a", A)
    resident = _bank()
    with bank.using("a"), resident.using("a"):
        expected = tiny.logits(resident.model, tiny.batch())
        assert torch.equal(tiny.logits(model, tiny.batch()), expected)


def _offloaded_dora(folder: Path) -> None:
    model = tiny.llama()
    accelerate.cpu_offload(model, "cpu")
    lk.attach(model, lk.LoraConfig(r=2, target_modules=("q_proj",), use_dora=True))


def _meta(folder: Path) -> None:
    with torch.device("meta"):
        model = tiny.llama()
    lk.attach(model)


def _dora_in_another_dtype(folder: Path) -> None:
    """A DoRA merged in fp32 from a bf16 base computes what the bank computes in fp32."""
    base = merging.base_folder(folder / "half", tiny.llama(dtype=torch.bfloat16))
    merging.adapter_folder(base, folder / "dora", target_modules=["q_proj"], use_dora=True)
    merge(base, folder / "dora", folder / "merged", dtype="float32")
    model = lk.load_base(base, dtype="fp32").model
    bank = lk.attach(model, slots=1)
    bank.load("dora", folder / "dora", allow={"other-base"})
    bank.use("dora")
    found = tiny.logits(lk.load_base(folder / "merged").model, tiny.batch())
    assert torch.allclose(found, tiny.logits(model, tiny.batch()), atol=1e-5)


def _row(name: str, act: Act, says: str = "", *, error: type[LoraKitError] | None = None, **more: Any) -> Fault:
    return Fault(name=name, make=no_files, act=act, error=error, says=says, **more)


ROUTING: tuple[Fault, ...] = (
    _row("threads with routes of their own", _threads),
    _row("tasks with routes of their own", _tasks),
    _row("gradients of two adapters with checkpointing", _checkpointing(reentrant=False)),
    _row("gradients of two adapters with reentrant checkpointing", _checkpointing(reentrant=True)),
    *(
        _row(f"a bank of {dtype}", _dtype(dtype), str(dtype).split(".")[-1], error=ConfigError)
        for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn, "int8")
    ),
    _row("a bank on a part of a model that has one", _bank_on_part, "bank", error=BankError),
    _row("adapters and errors are copied and pickled", _copies),
    _row("a model with a bank is copied", _copied_model),
    _row("rows of another number than the batch's", _too_few_rows, "batch of 3|rows", error=RoutingError),
)
LAYERS: tuple[Fault, ...] = (
    _row("outputs that are changed in place", _in_place),
    _row("an offloaded base", _offloaded),
    _row("DoRA on an offloaded base", _offloaded_dora, "offloaded", error=TargetError),
    _row("a base on meta", _meta, "on meta", error=BankError),
    _row("a DoRA merged into fp32 from bf16", _dora_in_another_dtype, writes=True),
)
