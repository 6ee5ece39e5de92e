"""`python -m tests.faults.soak [--minutes 60] [--write]`: what a bank can do, at random, against a slow plain model.

The plain model knows what each name holds, and computes with `W + s B A` in place of each weight. Ends with 1 at the
first result that is not the plain model's, at a slot that is not given back, or where memory grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.func import functional_call

import lora_kit as lk
from benchmarks import harness
from lora_kit.errors import BankError, LoraKitError, UnknownAdapterError
from tests.faults import reliability_page
from tests.faults.quiet import hush
from tests.support import folders, tiny
from tests.support.folders import PATHS

RESULT: Final = harness.RESULTS / "soak.json"
SLOTS: Final = 4
NAMES: Final = tuple("abcdef")
CLOSE: Final = {"rtol": 1e-3, "atol": 1e-4}
MAX_GROWTH: Final = 30
"""MB that a process may grow between a tenth of the run and its end."""
_LEARNING_RATE: Final = 0.05


class PlainModel:
    """The slow model of what must be true: a base, and for each name the tensors that it holds."""

    def __init__(self) -> None:
        self.model = tiny.llama()
        self.held: dict[str, dict[str, Tensor]] = {}

    def weights(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return the weights that differ from the base's."""
        if tensors is None:
            return {}
        found = {}
        for path in PATHS:
            a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB")
            found[f"{path}.weight"] = self.model.get_parameter(f"{path}.weight").detach() + 2.0 * b @ a
        return found

    def logits(self, name: str | None, ids: Tensor) -> Tensor:
        """Return the logits of an adapter; of the base for None."""
        with torch.no_grad():
            return self._forward(self.held[name] if name else None, ids)

    def _forward(self, tensors: Mapping[str, Tensor] | None, ids: Tensor) -> Tensor:
        output: Tensor = functional_call(self.model, self.weights(tensors), (), {"input_ids": ids}).logits
        return output

    def train(self, name: str, ids: Tensor) -> None:
        """Take one step of plain gradient descent."""
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in self.held[name].items()}
        loss = self._forward(leaves, ids).square().mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        self.held[name] = {
            key: (leaf - _LEARNING_RATE * gradient).detach()
            for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        }


class Soak:
    """A bank and its plain model, which must agree after every step.

    Attributes:
        counts: how often each kind of step was taken.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.chance = random.Random(seed)
        self.folder = folder
        self.plain = PlainModel()
        self.bank = lk.attach(tiny.llama(), slots=SLOTS, max_rank=4, dtype=torch.float32)
        self.values = [folders.adapter(seed=seed) for seed in range(6)]
        self.trained: set[str] = set()
        self.counts = Counter[str]()
        self.steps = [getattr(self, name) for name in dir(type(self)) if name.startswith("step_")]

    def take_step(self) -> None:
        """Take one step of any kind, and check that the names are those that must be there."""
        step = self.chance.choice(self.steps)
        step()
        self.counts[step.__name__.removeprefix("step_").replace("_", " ")] += 1
        assert set(self.bank.names) == set(self.plain.held), (self.bank.names, sorted(self.plain.held))

    def any_name(self) -> str | None:
        """Return a name that holds something; None for the base, too."""
        return self.chance.choice([None, *self.plain.held])

    def ids(self, rows: int) -> Tensor:
        return tiny.batch(rows=rows, length=self.chance.randint(2, 6), seed=self.chance.randrange(99))["input_ids"]

    def step_load(self) -> None:
        name, value = self.chance.choice(NAMES), self.chance.choice(self.values)
        fits = name not in self.plain.held and len(self.plain.held) < SLOTS
        try:
            self.bank.load(name, value)
        except BankError:
            assert not fits, "there was a slot"
        else:
            assert fits, "it took the place of another one"
            self.plain.held[name] = dict(value.tensors)

    def step_unload(self) -> None:
        name = self.any_name()
        if name:
            self.bank.unload(name)
            self._forget(name)

    def _forget(self, name: str) -> None:
        self.plain.held.pop(name)
        self.trained.discard(name)

    def step_replace(self) -> None:
        name, value = self.any_name(), self.chance.choice(self.values)
        if name:
            self.bank.unload(name)
            self._forget(name)
            self.bank.load(name, value)
            self.plain.held[name] = dict(value.tensors)

    def step_ask_for_an_unknown_name(self) -> None:
        try:
            self.bank.use("nobody")
        except UnknownAdapterError:
            return
        raise AssertionError("an unknown name was used")

    def step_use(self) -> None:
        name, ids = self.any_name(), self.ids(2)
        with self.bank.using(name), torch.no_grad():
            torch.testing.assert_close(self.bank.model(input_ids=ids).logits, self.plain.logits(name, ids), **CLOSE)

    def step_rows(self) -> None:
        names = [self.any_name() for _ in range(3)]
        ids = self.ids(3)
        with self.bank.rows(names), torch.no_grad():
            found = self.bank.model(input_ids=ids).logits
        for number, name in enumerate(names):
            torch.testing.assert_close(found[number], self.plain.logits(name, ids)[number], **CLOSE)

    def step_runs(self) -> None:
        names = [self.any_name() for _ in range(3)]
        runs = [(name, self.chance.randint(1, 4)) for name in names]
        x = torch.randn(1, sum(count for _, count in runs), 32)
        path = PATHS[0]
        with self.bank.runs(runs), torch.no_grad():
            found = self.bank.model.get_submodule(path)(x)
        start = 0
        for name, count in runs:
            changed = self.plain.weights(self.plain.held[name] if name else None)
            weight = changed.get(f"{path}.weight", self.plain.model.get_parameter(f"{path}.weight").detach())
            piece = slice(start, start + count)
            torch.testing.assert_close(found[0, piece], x[0, piece] @ weight.T, **CLOSE)
            start += count

    def step_lease(self) -> None:
        """What is leased is unloaded meanwhile, and used all the same."""
        name = self.any_name()
        if not name or name in self.trained:
            return
        weight, x = self.plain.weights(self.plain.held[name])[f"{PATHS[1]}.weight"], torch.randn(1, 3, 32)
        with self.bank.lease(name) as lease:
            self.bank.unload(name)
            with self.bank.runs([(lease, 3)]), torch.no_grad():
                found = self.bank.model.get_submodule(PATHS[1])(x)
        torch.testing.assert_close(found, x @ weight.T, **CLOSE)
        self._forget(name)

    def step_generate(self) -> None:
        """The first token is the most probable one of the plain model."""
        name, ids = self.any_name(), self.ids(1)
        with self.bank.using(name), torch.no_grad():
            found = self.bank.model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        allowed = self.plain.logits(name, ids)[0, -1].index_fill(0, torch.tensor([2]), -float("inf"))
        assert float(allowed.max() - allowed[found[0, ids.shape[1]]]) < 1e-3, "another adapter's token"

    def step_add(self) -> None:
        name = self.chance.choice(NAMES)
        try:
            self.bank.add(name, folders.config(init_lora_weights=False))
        except BankError:
            assert name in self.plain.held or len(self.plain.held) == SLOTS
        else:
            self.plain.held[name] = {key: tensor.clone() for key, tensor in self.bank.snapshot(name).tensors.items()}
            self.trained.add(name)

    def step_train(self) -> None:
        for name in sorted(self.trained):
            ids, leaves = self.ids(2), self.bank.parameters(name)
            with self.bank.using(name):
                loss = self.bank.model(input_ids=ids).logits.square().mean()
            loss.backward()
            with torch.no_grad():
                for leaf in leaves:
                    assert leaf.grad is not None
                    leaf -= _LEARNING_RATE * leaf.grad
                    leaf.grad = None
            self.plain.train(name, ids)
        self._check_trained()

    def _check_trained(self) -> None:
        for name in self.trained:
            for key, tensor in self.bank.snapshot(name).tensors.items():
                torch.testing.assert_close(tensor, self.plain.held[name][key], **CLOSE)

    def step_checkpoint(self) -> None:
        """What is trained on from a checkpoint is what it held."""
        state = {name: {key: t.clone() for key, t in part.items()} for name, part in self.bank.state_dict().items()}
        before = {name: dict(self.plain.held[name]) for name in self.trained}
        self.step_train()
        self.bank.load_state_dict(state)
        self.plain.held.update(before)
        self._check_trained()

    def step_save(self) -> None:
        name = self.any_name()
        if name:
            saved = self.bank.save(name, self.folder / "saved", replace=True)
            assert lk.Adapter.load(self.folder / "saved") == saved == self.bank.snapshot(name)

    def step_kill_a_save(self) -> None:
        """A process that saves is killed: the folder is what it was, or what was to be saved."""
        old, new = self.chance.sample(self.values, 2)
        target = self.folder / "killed"
        old.save(target, replace=True)
        child = os.fork()
        if child == 0:
            new.save(target, replace=True)
            os._exit(0)
        time.sleep(self.chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert lk.Adapter.load(target) in (old, new)

    def step_load_what_is_broken(self) -> None:
        """A load that fails changes nothing: what follows is compared with the plain model as ever."""
        path = folders.adapter().save(self.folder / "broken", replace=True) / "adapter_model.safetensors"
        data = bytearray(path.read_bytes())
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(data)
        try:
            self.bank.load("broken", self.folder / "broken")
        except LoraKitError:
            return
        raise AssertionError("a changed bit was not seen")

    def step_begin_anew(self) -> None:
        """Unload everything: then every slot is free, and the model is the base."""
        if self.chance.random() > 0.1:
            return
        for name in list(self.plain.held):
            self.bank.unload(name)
            self._forget(name)
        for number in range(SLOTS):
            self.bank.load(f"slot-{number}", self.values[0])
        for number in range(SLOTS):
            self.bank.unload(f"slot-{number}")
        self.bank.detach()
        ids = self.ids(2)
        assert torch.equal(tiny.logits(self.bank.model, {"input_ids": ids}), self.plain.logits(None, ids))
        self.bank = lk.attach(self.bank.model, slots=SLOTS, max_rank=4, dtype=torch.float32)


def measure_memory() -> float:
    """Return the resident memory of this process in MB."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as sizes:
        return int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_soak(*, seconds: float, seed: int, folder: Path, least: int = 0) -> dict[str, object]:
    """Take steps for some seconds, and at least a number of them; return the counts.

    Raises:
        AssertionError: a result is not the plain model's.
    """
    soak, began, early = Soak(seed, folder), time.monotonic(), 0.0
    while (spent := time.monotonic() - began) < seconds or soak.counts.total() < least:
        soak.take_step()
        if not early and spent > seconds / 10:
            early = measure_memory()
    counts: dict[str, object] = {"minutes": (time.monotonic() - began) / 60, "steps": soak.counts.total()}
    return counts | {"counts": dict(soak.counts), "memory_early": early, "memory_end": measure_memory(), "wrong": 0}


def main() -> int:
    """Run for the minutes that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the counts, and the table of docs/reliability.md")
    arguments = parser.parse_args()
    hush()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = run_soak(seconds=arguments.minutes * 60, seed=arguments.seed, folder=Path(folder))
    print(json.dumps(result), flush=True)
    if arguments.write:
        RESULT.write_text(json.dumps({**harness.environment(), **result}, indent=1) + "\n", encoding="utf-8")
        reliability_page.fill()
    growth = float(str(result["memory_end"])) - float(str(result["memory_early"]))
    return 0 if growth < MAX_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
