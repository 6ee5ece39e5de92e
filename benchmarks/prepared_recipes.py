"""Is the recipe that `prepare` writes as good as a tuned one?

A few rows of a training file are prepared as a user would prepare them. The recipe that comes out is trained untouched,
and with other learning rates and epochs; each run is judged on other rows of the training file. The defaults in
`lora_kit.data.preparation.training_defaults` were chosen by these tables. Then the untouched recipe and the best of
the tried ones are trained with each seed and judged by the test file. What its numbers are not stands in README.md.

    python -m benchmarks.prepared_recipes --data FOLDER --encoder FOLDER    # banking77/train.jsonl and so on
    python -m benchmarks.prepared_recipes --data FOLDER --encoder FOLDER --collect    # the result of what is finished
    python -m benchmarks.prepared_recipes --table                                     # README.md from the result

Whatever is finished is kept in the work folder, under a key of everything that decides it, and is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import lora_kit as lk
from benchmarks.harness import README, RESULTS, WORK, environment, fill, quiet, table
from lora_kit.data.preparation.prepare import prepare
from lora_kit.names import KIT_BASE
from lora_kit.training.recipe.load import load_recipe

RESULT: Final = RESULTS / "prepared_recipes.json"
SIZES: Final = (200, 2000)
Overrides = Mapping[str, float]
"""Keys of the `train` section; empty for the recipe as `prepare` wrote it."""


@dataclass(frozen=True)
class Corpus:
    """A data set, what is trained on it, and what is tried.

    Attributes:
        metric: what judges a run. better: the sign of a better one.
        base: `encoder`, or the name of a base.
        judges: rows that judge a run: of the training file for a search, of the test file for the final runs.
        tried: by number of rows: other values of the `train` section.
    """

    metric: str
    better: int
    base: str
    judges: int
    tried: Mapping[int, Sequence[Overrides]]


def _rates(rate: float, head: float, epochs: int) -> Overrides:
    return {"learning_rate": rate, "head_learning_rate": head, "num_train_epochs": epochs}


def _rate(rate: float, epochs: int) -> Overrides:
    return {"learning_rate": rate, "num_train_epochs": epochs}


_LABELS: Final[Mapping[int, Sequence[Overrides]]] = {
    200: [_rate(5e-4, 3), _rates(1e-3, 0.01, 5), _rates(2e-3, 0.02, 5), _rates(1e-3, 0.01, 10), _rates(2e-3, 0.02, 10)],
    2000: [_rate(5e-4, 3), _rates(1e-3, 0.01, 3), _rates(2e-3, 0.02, 3)],
}
_COMPLETIONS: Final[Mapping[int, Sequence[Overrides]]] = {
    200: [_rate(5e-4, 3), _rate(2e-3, 3), _rate(2e-3, 5), _rate(2e-3, 10)],
    2000: [_rate(5e-4, 3), _rate(2e-3, 3)],
}
CORPORA: Final[Mapping[str, Corpus]] = {
    "banking77": Corpus("accuracy", 1, "encoder", 500, _LABELS),
    "sst2": Corpus("accuracy", 1, "encoder", 500, _LABELS),
    "e2e": Corpus("perplexity", -1, KIT_BASE, 100, _COMPLETIONS),
}


class Bench:
    """The runs on some rows of one corpus, each done once."""

    def __init__(self, name: str, size: int, options: argparse.Namespace) -> None:
        self.name, self.size, self.corpus, self.done = name, size, CORPORA[name], options.collect
        self.base = str(options.encoder) if self.corpus.base == "encoder" else self.corpus.base
        lines = (options.data / name / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(lines)
        test = (options.data / name / "test.jsonl").read_text("utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(test)
        # Rows that judge are the same for every size, and never among those that are trained on.
        judges = self.corpus.judges
        files = {"rows": lines[judges : judges + size], "held": lines[:judges], "test": test[:judges]}
        files |= {judge: _with_labels_of(files[judge], files["rows"]) for judge in ("held", "test")}
        key = hashlib.sha256("".join(itertools.chain(*files.values())).encode()).hexdigest()[:12]
        self.work = options.work / f"{name}-{size}-{key}"
        self.work.mkdir(parents=True, exist_ok=True)
        for part, content in files.items():
            (self.work / f"{part}.jsonl").write_text("".join(content), encoding="utf-8")
        found = prepare(self.work / "rows.jsonl", self.work / "prepared", base=self.base, replace=True)
        assert found.recipe is not None
        self.recipe = load_recipe(found.recipe)

    def run(self, overrides: Overrides, *, judge: str, seed: int) -> dict[str, Any] | None:
        """Return how a recipe did, from the work folder where that is known; None if only that is asked for."""
        recipe = self.recipe.replace(
            train={**self.recipe.train, **overrides, "seed": seed, "save_strategy": "no"},
            data=dataclasses.replace(self.recipe.data, validation=str(self.work / f"{judge}.jsonl")),
            out=str(self.work / "out"),
        )
        decides = json.dumps([dict(recipe.train), recipe.to_dict()["lora"], judge], sort_keys=True)
        kept = self.work / f"{hashlib.sha256(decides.encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            if self.done:
                return None
            started = time.perf_counter()
            report = lk.train(recipe, replace=True)
            assert report.after is not None
            value = report.after.metrics()[self.corpus.metric]
            told = {"overrides": dict(overrides), "seed": seed, self.corpus.metric: value, "steps": report.steps}
            kept.write_text(json.dumps(told) + "\n", encoding="utf-8")
            taken = time.perf_counter() - started
            print(f"{self.name} {self.size} {judge} {taken:.0f} s: {json.dumps(told)}", file=sys.stderr, flush=True)
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def result(self, seeds: int) -> dict[str, Any]:
        """Return the runs of the search, and the final ones of the untouched recipe and of the best that was tried."""
        tried = [self.run(overrides, judge="held", seed=0) for overrides in ({}, *self.corpus.tried[self.size])]
        finished = [run for run in tried if run is not None]
        written = {key: self.recipe.train.get(key) for key in WRITTEN}
        told: dict[str, Any] = {"metric": self.corpus.metric, "written": written, "tried": finished}
        if len(finished) < len(tried):
            return told
        best = max(finished, key=lambda run: self.corpus.better * run[self.corpus.metric])
        for kind, overrides in {"untouched": {}, "tuned": best["overrides"]}.items():
            final = [self.run(overrides, judge="test", seed=seed) for seed in range(1, seeds + 1)]
            told[kind] = [run for run in final if run is not None]
        return told


def _with_labels_of(lines: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the rows whose label the known rows have too: with 200 rows, some of 77 labels have none."""
    labels = {json.loads(line).get("label") for line in known}
    return [line for line in lines if json.loads(line).get("label") in labels]


WRITTEN: Final = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "head_learning_rate")
"""Keys of the `train` section that the result records."""


def render(result: Mapping[str, Any]) -> str:
    """Return the result as tables in Markdown: what was tried, and the final runs where they are finished."""
    tried, finals = [], []
    for name, sizes in result["data"].items():
        for size, told in sizes.items():
            metric = told["metric"]
            for run in told["tried"]:
                settings = run["overrides"] or told["written"]
                tried.append([name, size, *(_cell(settings.get(key)) for key in _SHOWN), f"{run[metric]:.3f} {metric}"])
            values = [mean(run[metric] for run in told[kind]) for kind in ("untouched", "tuned") if told.get(kind)]
            if values:
                finals.append([name, size, metric, *(f"{value:.3f}" for value in values)])
    tried = [row for place, row in enumerate(tried) if row not in tried[:place]]
    tables = [table(["data", "rows", "epochs", "learning rate", "of the head", "on other rows"], tried)]
    if finals:
        tables.append(table(["data", "rows", "judged by", "untouched", "tuned"], finals))
    return "\n\n".join(tables)


_SHOWN: Final = ("num_train_epochs", "learning_rate", "head_learning_rate")


def _cell(value: float | None) -> str:
    return "the same" if value is None else f"{value:g}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of banking77, sst2 and e2e (default: $PREPARED_DATA)")
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained encoder")
    parser.add_argument("--only", nargs="*", choices=list(CORPORA), default=list(CORPORA), metavar="NAME")
    parser.add_argument("--sizes", nargs="*", type=int, choices=SIZES, default=list(SIZES), metavar="ROWS")
    parser.add_argument("--seeds", type=int, default=3, help="of the final runs")
    parser.add_argument("--work", type=Path, default=WORK / "prepared_recipes")
    parser.add_argument("--collect", action="store_true", help="train nothing; the result of what is finished")
    parser.add_argument("--table", action="store_true", help="train nothing; README.md from the result")
    options = parser.parse_args(argv)
    if options.data is None and "PREPARED_DATA" in os.environ:
        options.data = Path(os.environ["PREPARED_DATA"])
    if not options.table and (options.data is None or options.encoder is None):
        parser.error("--data and --encoder are needed")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    if not options.table:
        quiet()
        data = {
            name: {str(size): Bench(name, size, options).result(options.seeds) for size in options.sizes}
            for name in options.only
        }
        result = {"seeds": options.seeds, "data": data, **environment()}
        RESULT.write_text(json.dumps(result, indent=2, default=asdict) + "\n", encoding="utf-8")
    fill(README, render(json.loads(RESULT.read_text(encoding="utf-8"))), mark="prepared_recipes")


if __name__ == "__main__":
    main()
