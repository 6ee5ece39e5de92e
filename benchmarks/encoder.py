"""Is an adapter on an encoder as good as the whole encoder, and as good as PEFT's?

A pretrained BERT learns to classify: features (a head on the frozen body), LoRA (r=16 on all linear layers), and full
fine-tuning, each by lora_kit and by PEFT (by transformers alone where nothing is adapted). What makes the comparison
fair, and what its numbers are not, stands in README.md.

    python -m benchmarks.encoder --data FOLDER --encoder FOLDER    # banking77/train.jsonl, test.jsonl and so on
    python -m benchmarks.encoder --data FOLDER --encoder FOLDER --collect    # the result of what is finished

Whatever is finished is kept in the work folder, under a key of everything that decides it, and is not done again.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

from benchmarks import encoder_sides as sides
from benchmarks.encoder_sides import Trained, Training
from benchmarks.harness import README, RESULTS, WORK, environment, fill, quiet, ratio, table, timings

RESULT: Final = RESULTS / "encoder.json"


@dataclass(frozen=True, order=True)
class Rates:
    """Learning rates: of everything, and of the head where it has its own."""

    rate: float
    head: float | None = None

    def __str__(self) -> str:
        return f"{self.rate:g}" if self.head is None else f"{self.rate:g}, head {self.head:g}"


HEAD_RATES: Final = (0.01, 0.1)
TRIED: Final[Mapping[str, tuple[Rates, ...]]] = {
    "features": tuple(Rates(rate) for rate in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
    "lora": tuple(Rates(rate, head) for rate in (0.001, 0.003) for head in HEAD_RATES),
    "full": tuple(Rates(rate, head) for rate in (0.00015, 0.0005) for head in HEAD_RATES),
}
"""As many for `lora` as for `full`; the head alone learns in a fraction of their time, and has six."""
EPOCHS: Final = {"banking77": 2, "sst2": 1}
SIDES: Final[Mapping[str, tuple[Callable[..., Trained], Callable[..., float]]]] = {
    "lora_kit": (sides.ours, sides.our_accuracy),
    "peft": (sides.theirs, sides.their_accuracy),
}


@dataclass(frozen=True)
class Settings:
    """Everything besides data and encoder that decides the outcome.

    Attributes:
        batch: rows in a step.
        search: steps of a run that tries rates.
        held: rows of the training set that judge such a run.
        agree: steps over which losses are compared, in fp32 and without dropout.
        rounds, turn: of the timing, and steps in a turn.
        limit: rows of the training and of the test set at most; 0 for all.
        seed: of the search, and the first of the runs that are judged by the test set.
    """

    batch: int = 32
    search: int = 124
    held: int = 1000
    agree: int = 5
    rounds: int = 5
    turn: int = 8
    limit: int = 0
    seed: int = 0


class Bench:
    """The runs on one data set, each done once."""

    def __init__(
        self, name: str, data: Path, encoder: Path, work: Path, settings: Settings, *, seeds: int, done: bool
    ) -> None:
        self.name, self.settings, self.encoder, self.done = name, settings, encoder, done
        self.seeds = range(settings.seed, settings.seed + seeds)
        self.train, self.test = (self._limited(sides.read(data / name / f"{split}.jsonl")) for split in SPLITS)
        labels = {row["label"] for row in self.train}
        self.labels = tuple(str(label) for label in sorted(labels))
        decides = [name, asdict(settings), self.facts()]
        self.work = work / f"{name}-{digest(json.dumps(decides, sort_keys=True).encode())[:12]}"
        self.work.mkdir(parents=True, exist_ok=True)
        write_rows(self.work / "test.jsonl", self.test)

    def _limited(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        limit = self.settings.limit
        return rows[:: max(1, len(rows) // limit)] if limit else rows

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"labels": len(self.labels), "epochs": EPOCHS[self.name], "steps": self.steps}
        for split, rows in zip(SPLITS, (self.train, self.test), strict=True):
            found[split] = {"rows": len(rows), "sha256": digest(json.dumps(rows).encode())}
        return {**found, "encoder": digest((self.encoder / "model.safetensors").read_bytes())}

    @property
    def steps(self) -> int:
        return EPOCHS[self.name] * (len(self.train) // self.settings.batch)

    def once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """The result of a piece of work, from the work folder where it was finished before."""
        kept = self.work / f"{name}.json"
        if not kept.exists():
            if self.done:
                return None
            started = time.perf_counter()
            partial_file = kept.with_suffix(".partial")
            partial_file.write_text(json.dumps(work(), indent=2) + "\n", encoding="utf-8")
            partial_file.replace(kept)
            gc.collect()
            say(f"{self.name} {name}: {time.perf_counter() - started:.0f} s: {kept.read_text('utf-8').split()}")
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def result(self) -> dict[str, Any]:
        """Everything about this data set; what is not finished is left out where only finished work is asked for."""
        found: dict[str, Any] = {"facts": self.facts(), "agreement": self.once("agreement", self.agreement)}
        found["methods"] = {method: self.searched(method) for method in TRIED}
        for seed in self.seeds:
            for side in SIDES:
                for method, cells in found["methods"].items():
                    if "best" in cells:
                        told = self.once(*self.final(method, Rates(**cells["best"]), side, seed))
                        cells[side] = [*cells.get(side, []), *([told] if told else [])]
        found["time"] = self.once("time", self.timed)
        return found

    def searched(self, method: str) -> dict[str, Any]:
        """The rates tried and, once all of them are, the best."""
        judged: dict[Rates, float] = {}
        for rates in TRIED[method]:
            found = self.once(f"{method}-{slug(rates)}", partial(self.tried, method, rates))
            if found is not None:
                judged[rates] = found["accuracy"]
        told: dict[str, Any] = {"tried": [{**asdict(rates), "accuracy": found} for rates, found in judged.items()]}
        return told | ({"best": asdict(best_of(judged))} if len(judged) == len(TRIED[method]) else {})

    def tried(self, method: str, rates: Rates) -> dict[str, Any]:
        """Accuracy of a short run on rows that it has not seen."""
        rows = list(self.train)
        random.Random(self.settings.seed).shuffle(rows)
        count = min(self.settings.held, len(rows) // 5)
        held, rest = rows[:count], rows[count:]
        write_rows(self.work / "held.jsonl", held)
        steps = min(self.settings.search, self.steps)
        task = self.training(method, rates, rows=rest, steps=steps)
        return self.run(task, "lora_kit", judge=self.work / "held.jsonl")

    def final(self, method: str, rates: Rates, side: str, seed: int) -> tuple[str, Callable[[], dict[str, Any]]]:
        """The name of a run that the test set judges, and the run."""

        def work() -> dict[str, Any]:
            task = self.training(method, rates, rows=self.train, steps=self.steps, seed=seed)
            return self.run(task, side, judge=self.work / "test.jsonl")

        return f"{method}-{slug(rates)}-{side}" + (f"-{seed}" if seed else ""), work

    def run(self, task: Training, side: str, *, judge: Path) -> dict[str, Any]:
        train, judged = SIDES[side]
        out = self.work / f"{task.method}-{side}"
        trained = train(replace(task, log=max(1, min(25, task.steps))), out)
        told = {**asdict(trained), "losses": [round(loss, 4) for loss in trained.losses]}
        return {"accuracy": judged(task, out, judge), "steps": task.steps, **told}

    def training(
        self,
        method: str,
        rates: Rates,
        *,
        rows: list[dict[str, Any]],
        steps: int,
        start: str = "start",
        seed: int | None = None,
    ) -> Training:
        file, batch = self.work / f"rows-{method}-{steps}.jsonl", self.settings.batch
        seed = self.settings.seed if seed is None else seed
        write_rows(file, in_batches(rows, batch, steps, seed=seed))
        dropout = 0.0 if start == "still" else None
        if not (self.work / start / "config.json").exists():
            sides.start_of(self.encoder, self.labels, self.work / start, dropout=dropout)
        return Training(
            start=self.work / start, rows=file, labels=self.labels, method=method, rate=rates.rate, head=rates.head,
            steps=steps, batch=batch, seed=seed,
        )  # fmt: skip

    def few(self, steps: int) -> list[dict[str, Any]]:
        """Rows for a few steps, of every label at least one: the head's size follows from the labels."""
        first = {str(row["label"]): row for row in self.train}
        count = self.settings.batch * steps
        rest = random.Random(self.settings.seed).sample(self.train, count)
        return [*first.values(), *rest][: max(count, len(first))]

    def agreement(self) -> dict[str, Any]:
        """The largest relative difference of the two sides' losses, step by step.

        Raises:
            AssertionError: it is no rounding: one side does other work than the other.
        """
        found: dict[str, Any] = {}
        for method, tried in TRIED.items():
            steps = self.settings.agree
            task = self.training(method, tried[0], rows=self.few(steps), steps=steps, start="still")
            task = replace(task, bf16=False, log=1)
            own, other = (train(task, self.work / f"agree-{method}-{side}") for side, (train, _) in SIDES.items())
            assert own.trainable == other.trainable, f"{method}: {own.trainable} and {other.trainable} are trained"
            worst = max(abs(a / b - 1) for a, b in zip(own.losses, other.losses, strict=True))
            assert worst < 1e-4, f"{method}: {own.losses} and {other.losses}"
            found[method] = {"trainable": own.trainable, "worst": worst}
        return found

    def timed(self) -> dict[str, Any]:
        """CPU time of a few steps, the two sides of all methods taking turns."""
        cells = [(method, side) for method in ("full", "lora", "features") for side in SIDES]
        taken: dict[str, list[float]] = {f"{method}, {side}": [] for method, side in cells}
        for number in range(self.settings.rounds + 1):
            for method, side in cells[:: -1 if number % 2 else 1]:
                steps = self.settings.turn
                task = self.training(method, TRIED[method][0], rows=self.few(steps), steps=steps)
                trained = SIDES[side][0](task, self.work / f"timed-{method}-{side}")
                if number:
                    taken[f"{method}, {side}"].append(trained.cpu_seconds)
        told = {}
        for method in TRIED:
            pair = {side: taken[f"{method}, {side}"] for side in ("peft", "lora_kit")}
            told[method] = {side: asdict(found) for side, found in timings(pair).items()}
        return told


SPLITS: Final = ("train", "test")


def best_of(judged: Mapping[Rates, float]) -> Rates:
    """The rates of the highest accuracy; of equals the lowest."""
    return max(sorted(judged), key=lambda rates: judged[rates])


def slug(rates: Rates) -> str:
    return f"{rates.rate:g}" + ("" if rates.head is None else f"-head-{rates.head:g}")


def in_batches(rows: Sequence[dict[str, Any]], batch: int, steps: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows for that many steps: shuffled for every epoch, batches of like lengths in any order, no short batch."""
    draw = random.Random(seed)
    found: list[dict[str, Any]] = []
    while len(found) < batch * steps:
        epoch = list(rows)
        draw.shuffle(epoch)
        chunks: list[list[dict[str, Any]]] = []
        for start in range(0, len(epoch), 50 * batch):
            near = sorted(epoch[start : start + 50 * batch], key=lambda row: len(row["text"]))
            chunks += [near[place : place + batch] for place in range(0, len(near), batch)]
        whole = [chunk for chunk in chunks if len(chunk) == batch]
        draw.shuffle(whole)
        found += [row for chunk in whole for row in chunk]
    return found[: batch * steps]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv)
    if arguments.table:
        fill(README, page(json.loads(arguments.out.read_text(encoding="utf-8"))), mark="encoder")
        return
    quiet()
    settings = Settings(limit=arguments.limit)
    found: dict[str, Any] = {}
    for name in arguments.sets:
        folders = arguments.data, arguments.encoder, arguments.work
        bench = Bench(name, *folders, settings, seeds=arguments.seeds, done=arguments.collect)
        found[name] = bench.result()
        told = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "settings": asdict(settings), "how": HOW}
        text = json.dumps({**told, "data": found, **environment()}, indent=2, ensure_ascii=False)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    say(f"wrote {arguments.out}")
    if arguments.out.resolve() == RESULT:
        fill(README, page(json.loads(RESULT.read_text(encoding="utf-8"))), mark="encoder")


HOW: Final = {
    "accuracy": "share of the test set, in fp32, of the saved result loaded again; a run for each seed",
    "cpu_seconds": "of the training loop of that run; on a machine that others used at the same time",
    "seconds": "of the same loop by the clock, so with the waiting for others",
    "time": "CPU seconds of a few steps, the sides taking turns: the ratio is the one to quote",
}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="banking77/ and sst2/, each train.jsonl, test.jsonl"
    )
    parser.add_argument("--encoder", type=Path, metavar="FOLDER", help="a BERT as save_pretrained writes it")
    parser.add_argument("--sets", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--work", type=Path, default=WORK / "encoder", help="what finished work leaves")
    parser.add_argument("--out", type=Path, default=RESULT, help="README.md follows the default one only")
    parser.add_argument("--seeds", type=int, default=1, help="runs that the test set judges, of each method and side")
    parser.add_argument("--limit", type=int, default=0, help="about so many rows of each split, to try it out")
    parser.add_argument("--collect", action="store_true", help="run nothing: write what is finished")
    parser.add_argument("--table", action="store_true", help="write README.md from the result that is there")
    arguments = parser.parse_args(argv)
    if not arguments.table and not (arguments.data and arguments.encoder):
        parser.error("--data and --encoder are needed")
    return arguments


def page(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    machine = result["machine"]
    made = f"{result['date']}; {machine['device']}, {machine['threads']} thread; {versions}."
    return "\n\n".join([*(part for name, found in result["data"].items() for part in section(name, found)), made])


def section(name: str, found: Mapping[str, Any]) -> list[str]:
    """What there is of one data set."""
    facts, full = found["facts"], accuracies(found, "full")
    lines = []
    for method, cells in found["methods"].items():
        own = accuracies(found, method)
        tried = "; ".join(f"{shown(each)}: {percent(each['accuracy'])}" for each in cells["tried"])
        behind = [f"{100 * (mean(own[side]) - mean(full[side])):+.1f}" if own[side] and full[side] else "–"
                  for side in SIDES]  # fmt: skip
        reached = [", ".join(percent(value) for value in own[side]) or "–" for side in SIDES]
        timed = (found["time"] or {}).get(method, {}).get("lora_kit")
        best = shown(cells["best"]) if "best" in cells else "–"
        lines.append([method, f"{trained(found, method):,}", best, tried, *reached, *behind, ratio(timed)])
    head = ["method", "trained", "rates", "rates tried", "lora_kit", "PEFT", "to full", "PEFT", "CPU time of PEFT's"]
    told = (
        f"**{name}**: {facts['train']['rows']:,} rows to train on, {facts['test']['rows']:,} to test on, "
        f"{facts['labels']} labels; {facts['steps']} steps, {facts['epochs']} of the data."
    )
    agreement = found["agreement"]
    if agreement:
        worst = max(each["worst"] for each in agreement.values())
        told += f" Without dropout the losses of the first steps differ by {worst:.0e} of their value at most."
    return [told, table(head, lines)]


def shown(rates: Mapping[str, Any]) -> str:
    return str(Rates(rates["rate"], rates["head"]))


def accuracies(found: Mapping[str, Any], method: str) -> dict[str, list[float]]:
    """Accuracies on the test set by side, one for each seed that is finished."""
    cells = found["methods"][method]
    return {side: [run["accuracy"] for run in cells.get(side, [])] for side in SIDES}


def trained(found: Mapping[str, Any], method: str) -> int:
    """Elements that a method trains."""
    return int(found["agreement"][method]["trainable"]) if found["agreement"] else 0


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def say(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
