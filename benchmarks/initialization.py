"""Does it pay to initialize LoRA weights from the base's weights, or from the data?

The embedded base learns E2E NLG for a few steps with LoRA weights initialized as LoRA does it (Kaiming or normal), as
PiSSA and OLoRA do, or, made here and nowhere in the library, as EVA (from the layers' inputs) and LoRA-GA (from the
first gradient) do. What makes the comparison fair, and what its numbers are not, stands in README.md.

    python -m benchmarks.initialization --data FOLDER     # train.jsonl and valid.jsonl with prompt and completion
    python -m benchmarks.initialization --table           # README.md from the result, nothing else
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor

import lora_kit as lk
from benchmarks.harness import README, RESULTS, WORK, environment, fill, quiet, table
from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.data.encode import encode
from lora_kit.data.rows import Rows, read_rows
from lora_kit.evaluation.measure import measure

RESULT: Final = RESULTS / "initialization.json"
FINISHED: Final = WORK / "initialization.json"
"""Finished runs, so that one that was stopped goes on."""
RATES: Final = (3e-3, 1e-2, 3e-2)
FACTOR: Final = 3.0
"""Of further rates, which are tried while the best is the first or the last."""
MOST_RATES: Final = 5
LOOKED_AT: Final = 4000
"""Rows of each file of which the short ones are used."""
LORA_GA_GAMMA: Final = 16.0
LINEARS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Settings:
    """Everything besides data and base that decides the outcome.

    Attributes:
        steps: of a run, the first tenth of them to warm up.
        batch: rows in a step. length: tokens of a row at most; longer ones are left out.
        r, lora_alpha: of every linear layer of the decoder.
        chosen_by, judged_by: validation rows that choose a learning rate, and others that judge it.
        seeds: of the runs that are judged; rates are chosen with another.
    """

    steps: int = 32
    batch: int = 4
    length: int = 56
    r: int = 8
    lora_alpha: int = 16
    chosen_by: int = 64
    judged_by: int = 96
    seeds: tuple[int, ...] = (1, 2, 3)


class Bench:
    """Runs on one base and one data set."""

    def __init__(self, data: Path, settings: Settings) -> None:
        self.settings = settings
        self.base = lk.load_base("kit-base", dtype="fp32")
        self.collator = Collator(self.base.pad_token_id)
        self.train = self._encoded(data / "train.jsonl", slice(0, settings.steps * settings.batch))
        count = settings.chosen_by
        self.choosing = self._encoded(data / "valid.jsonl", slice(0, count))
        self.judging = self._encoded(data / "valid.jsonl", slice(count, count + settings.judged_by))

    def _encoded(self, file: Path, part: slice) -> EncodedDataset:
        """Some of the rows that are short enough, in an order that is the same for all."""
        rows = read_rows(file)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:LOOKED_AT].tolist()
        lengths = encode(chosen(rows, order), self.base.tokenizer, max_length=512).lengths.tolist()
        short = [row for row, length in zip(order, lengths, strict=True) if length <= self.settings.length]
        return encode(chosen(rows, short[part]), self.base.tokenizer, max_length=512)

    def method(self, name: str) -> dict[str, Any]:
        """Choose a rate, then judge it."""
        tried: dict[float, float] = {}
        ahead = list(RATES)
        while ahead:
            tried |= {rate: self.once(name, rate, seed=0, judges=self.choosing) for rate in ahead}
            ahead = further(tried)
        rate = min(tried, key=tried.__getitem__)
        losses = [self.once(name, rate, seed=seed, judges=self.judging) for seed in self.settings.seeds]
        return {"rate": rate, "tried": {f"{each:g}": loss for each, loss in sorted(tried.items())}, "losses": losses}

    def once(self, name: str, rate: float, *, seed: int, judges: EncodedDataset) -> float:
        """What a run came to, from the work folder where it was finished before."""
        finished = json.loads(FINISHED.read_text(encoding="utf-8")) if FINISHED.exists() else {}
        key = f"{name}, rate {rate:g}, seed {seed}, {self.settings}"
        if key not in finished:
            finished[key] = self.run(name, rate, seed=seed, judges=judges)
            FINISHED.parent.mkdir(exist_ok=True)
            FINISHED.write_text(json.dumps(finished, indent=1), encoding="utf-8")
        return float(finished[key])

    def run(self, name: str, rate: float, *, seed: int, judges: EncodedDataset) -> float:
        """The loss on some rows after a training; infinity where it came apart."""
        settings, model = self.settings, self.base.model
        with self._attached(name, seed) as bank:
            optimizer = torch.optim.AdamW(bank.parameters("a"), lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
            started = time.process_time()
            for step in range(1, settings.steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = rate * schedule(step, settings.steps)
                rows = order[(step - 1) * settings.batch : step * settings.batch]
                self.loss_of(rows).backward()
                torch.nn.utils.clip_grad_norm_(bank.parameters("a"), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            loss = measure(model, judges, self.collator, batch_size=32).loss
        say(f"{name}: rate {rate:g}, seed {seed}: {loss:.4f}, {time.process_time() - started:.0f} s of a core")
        return loss if loss == loss else float("inf")

    def loss_of(self, rows: list[int]) -> Tensor:
        batch = self.collator([self.train[row] for row in rows])
        loss: Tensor = self.base.model(**{k: v for k, v in batch.items() if isinstance(v, Tensor)}).loss
        return loss

    @contextmanager
    def _attached(self, name: str, seed: int) -> Iterator[lk.AdapterBank]:
        """A bank with a fresh adapter "a"; the base as it was afterwards."""
        settings, method = self.settings, METHODS[name]
        torch.manual_seed(seed)
        config = lk.LoraConfig(
            r=settings.r, lora_alpha=settings.lora_alpha, target_modules=LINEARS, init_lora_weights=method.init
        )
        given = method.prepare(self) if method.prepare else {}
        bank = lk.attach(self.base.model, config, name="a")
        try:
            with torch.no_grad():
                for path, tensors in given.items():
                    held = self.base.model.get_submodule(path).entries[1].tensors
                    for key, tensor in tensors.items():
                        held[key].copy_(tensor)
            yield bank
        finally:
            bank.detach()


# Starts that the library does not have


def eva(bench: Bench) -> dict[str, dict[str, Tensor]]:
    """A = the first r directions of a layer's inputs, B = 0 (Paischer et al. 2024, arXiv 2410.07170)."""
    squares: dict[str, Tensor] = {}

    def add(path: str, module: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0].detach().flatten(0, -2)
        squares[path] = squares.get(path, 0) + x.mT @ x

    with torch.no_grad(), hooked(bench, lambda path, module: module.register_forward_pre_hook(partial(add, path))):
        bench.loss_of(list(range(4 * bench.settings.batch)))
    return {
        path: {"lora_A": torch.linalg.eigh(each)[1].mT.flip(0)[: bench.settings.r]} for path, each in squares.items()
    }


def lora_ga(bench: Bench) -> dict[str, dict[str, Tensor]]:
    """A = the first r right, B = the next r left directions of the first gradient (Wang et al. 2024, arXiv 2407.05000).

    Both are orthonormal times out^(1/4) / √γ, as there; s B A is taken out of the base, as with PiSSA.
    """
    model, r, found = bench.base.model, bench.settings.r, {}
    weights = {path: module.weight for path, module in linears(model)}
    for weight in weights.values():
        weight.requires_grad_(True)
    bench.loss_of(list(range(4 * bench.settings.batch))).backward()
    for path, weight in weights.items():
        assert weight.grad is not None
        u, _, vt = torch.linalg.svd(weight.grad, full_matrices=False)
        size = weight.shape[0] ** 0.25 / LORA_GA_GAMMA**0.5
        found[path] = {"start of lora_A": size * vt[:r], "start of lora_B": size * u[:, r : 2 * r]}
        weight.grad = None
        weight.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return found


@dataclass(frozen=True)
class Method:
    """How pairs begin.

    Attributes:
        what: a line for the table.
        init: `LoraConfig.init_lora_weights`.
        prepare: gives tensors that are to stand in its place, by path of the layer.
    """

    what: str
    init: bool | str
    prepare: Callable[[Bench], dict[str, dict[str, Tensor]]] | None = None


METHODS: Final[Mapping[str, Method]] = {
    "default": Method("`true`: A Kaiming-uniform, B zero", True),
    "gaussian": Method("`gaussian`: A normal, B zero", "gaussian"),
    "pissa": Method("`pissa`", "pissa"),
    "olora": Method("`olora`", "olora"),
    "eva": Method("EVA (not in the library)", True, eva),
    "lora-ga": Method("LoRA-GA (not in the library)", "olora", lora_ga),
}


def chosen(rows: Rows, places: list[int]) -> Rows:
    values, lines = tuple(rows.values[place] for place in places), tuple(rows.lines[place] for place in places)
    return Rows(rows.path, rows.format, values, lines)


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if path.rpartition(".")[2] in LINEARS)


@contextmanager
def hooked(bench: Bench, hang: Callable[[str, Any], Any]) -> Iterator[None]:
    """Hooks on all linear layers, and off again."""
    handles = [hang(path, module) for path, module in linears(bench.base.model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step from 1: a tenth of the steps up, then down to zero, both straight."""
    warm = max(1, steps // 10)
    return step / warm if step <= warm else (steps - step + 1) / (steps - warm + 1)


def further(tried: Mapping[float, float]) -> list[float]:
    """The rate beyond the best one, where that is the lowest or the highest tried."""
    best = min(tried, key=tried.__getitem__)
    if len(tried) >= MOST_RATES or min(tried) < best < max(tried):
        return []
    return [best / FACTOR if best == min(tried) else best * FACTOR]


def rows_of(result: Mapping[str, Any]) -> list[list[str]]:
    """The table: every method beside the first one, run by run with the same seed."""
    methods, found = result["methods"], []
    first = next(iter(methods.values()))["losses"]
    for name, each in methods.items():
        gains = [loss - other for loss, other in zip(each["losses"], first, strict=True)]
        told = f"{statistics.mean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
        tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in each["tried"].items())
        cells = [METHODS[name].what, f"{each['rate']:g}", f"{statistics.mean(each['losses']):.3f}"]
        found.append([*cells, "–" if each["losses"] is first else told, tried])
    return found


def page(result: Mapping[str, Any]) -> str:
    head = ["start", "rate", "loss", "to the first, seed by seed", "rates tried"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{table(head, rows_of(result))}\n\n{versions}; {result['machine']['device']}, one thread."


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train.jsonl and valid.jsonl")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--table", action="store_true", help="write README.md from the result that is there, and stop")
    arguments = parser.parse_args()
    if arguments.data is None and not arguments.table:
        parser.error("--data is needed: a folder with train.jsonl and valid.jsonl")
    if not arguments.table:
        quiet()
        torch.set_num_threads(1)
        settings = Settings()
        bench = Bench(arguments.data, settings)
        facts = {"settings": asdict(settings), "methods": {name: bench.method(name) for name in arguments.methods}}
        RESULT.write_text(json.dumps({**facts, **environment()}, indent=2) + "\n", encoding="utf-8")
    fill(README, page(json.loads(RESULT.read_text(encoding="utf-8"))), mark="initialization")


if __name__ == "__main__":
    main()
