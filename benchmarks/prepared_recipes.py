"""Is the recipe that `prepare` writes as good as a tuned one?

A few rows of a training file are prepared as a user would prepare them. The recipe that comes out is trained untouched,
and with other learning rates and epochs; each run is judged on other rows of the training file. The defaults in
`lora_kit.data.preparation.training_defaults` were chosen by these tables. Then the untouched recipe and the best of
the tried ones are trained with each seed and judged by the test file, and so is PEFT with the untouched recipe's
settings (`benchmarks.prepared_with_peft`). What its numbers are not stands in README.md.

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
from benchmarks.prepared_with_peft import train_with_peft
from lora_kit.data.preparation.prepare import prepare
from lora_kit.names import KIT_BASE
from lora_kit.training.recipe.load import load_recipe
from lora_kit.training.recipe.recipe import Recipe

RESULT: Final = RESULTS / "prepared_recipes.json"
SIZES: Final = (200, 216, 2000)
Overrides = Mapping[str, float]
"""Keys of the `train` section; empty for the recipe as `prepare` wrote it."""


@dataclass(frozen=True)
class Corpus:
    """A data set, what is trained on it, and what is tried.

    Attributes:
        metric: what judges a run; better: the sign of a better one.
        base: `encoder`, or the name of a base.
        judges: rows that judge a run: of the training file for a search, of the test file for the final runs.
        tried: by number of rows: other values of the `train` section.
        folder: of its files.
        labels: those that are kept; empty for all.
    """

    metric: str
    better: int
    base: str
    judges: int
    tried: Mapping[int, Sequence[Overrides]]
    folder: str
    labels: tuple[str, ...] = ()

    def read(self, data: Path, part: str) -> list[str]:
        """Return the lines of one of its files, shuffled, with the labels that are kept."""
        lines = (data / self.folder / f"{part}.jsonl").read_text("utf-8").splitlines(keepends=True)
        if self.labels:
            lines = [line for line in lines if json.loads(line)["label"] in self.labels]
        random.Random(0).shuffle(lines)
        return lines


def _rates(rate: float, head: float, epochs: int, warmup: float = 0.1) -> Overrides:
    return {
        "learning_rate": rate,
        "head_learning_rate": head,
        "num_train_epochs": epochs,
        "warmup_steps": warmup,
    }


def _rate(rate: float, epochs: int) -> Overrides:
    return {"learning_rate": rate, "num_train_epochs": epochs}


_LABELS: Final[Mapping[int, Sequence[Overrides]]] = {
    200: [
        _rates(5e-4, 0.005, 10),
        _rates(1e-3, 0.01, 5),
        _rates(1e-3, 0.01, 10),
        _rates(1e-3, 0.01, 20),
        _rates(2e-3, 0.02, 10, warmup=0),
        _rates(2e-3, 0.02, 20),
    ],
    2000: [_rates(5e-4, 0.005, 3), _rates(1e-3, 0.01, 3), _rates(1e-3, 0.01, 5), _rates(2e-3, 0.02, 3)],
}
_FOUR_LABELS: Final = ("card_arrival", "lost_or_stolen_card", "exchange_rate", "change_pin")
_COMPLETIONS: Final[Mapping[int, Sequence[Overrides]]] = {
    200: [_rate(5e-4, 3), _rate(2e-3, 3), _rate(2e-3, 5), _rate(2e-3, 10)],
    2000: [_rate(5e-4, 3), _rate(2e-3, 3)],
}
CORPORA: Final[Mapping[str, Corpus]] = {
    "banking77": Corpus("accuracy", 1, "encoder", 500, _LABELS, "banking77"),
    "intents": Corpus("accuracy", 1, "encoder", 160, {216: []}, "banking77", _FOUR_LABELS),
    "sst2": Corpus("accuracy", 1, "encoder", 500, _LABELS, "sst2"),
    "e2e": Corpus("perplexity", -1, KIT_BASE, 100, _COMPLETIONS, "e2e"),
}
STAGES: Final = ("search", "untouched", "tuned", "peft")


class Bench:
    """The runs on some rows of one corpus, each done once."""

    def __init__(self, name: str, size: int, options: argparse.Namespace) -> None:
        self.name, self.size, self.corpus, self.done = name, size, CORPORA[name], options.collect
        self.base = str(options.encoder) if self.corpus.base == "encoder" else self.corpus.base
        self.stages = options.stages
        lines, test = (self.corpus.read(options.data, part) for part in ("train", "test"))
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

    def run(
        self, overrides: Overrides, *, judge: str, seed: int, stage: str, program: str = "lora-kit"
    ) -> dict[str, Any] | None:
        """Return how a recipe did, from the work folder where that is known; None if its stage is not to be run."""
        recipe = self.recipe.replace(
            train={**self.recipe.train, **overrides, "seed": seed, "save_strategy": "no"},
            data=dataclasses.replace(self.recipe.data, validation=str(self.work / f"{judge}.jsonl")),
            out=str(self.work / "out"),
        )
        decides = json.dumps([dict(recipe.train), recipe.to_dict()["lora"], judge, program], sort_keys=True)
        kept = self.work / f"{hashlib.sha256(decides.encode()).hexdigest()[:16]}.json"
        if not kept.exists():
            if self.done or stage not in self.stages:
                return None
            started = time.perf_counter()
            value, steps = (train_here if program == "lora-kit" else train_with_peft)(recipe, self.corpus.metric)
            told = {"overrides": dict(overrides), "seed": seed, self.corpus.metric: value, "steps": steps}
            kept.write_text(json.dumps(told) + "\n", encoding="utf-8")
            taken = time.perf_counter() - started
            print(f"{self.name} {self.size} {judge} {taken:.0f} s: {json.dumps(told)}", file=sys.stderr, flush=True)
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def result(self, seeds: int) -> dict[str, Any]:
        """Return the runs of the search, and the final ones: untouched, the best that was tried, PEFT as untouched."""
        tried = [
            self.run(overrides, judge="held", seed=0, stage="search")
            for overrides in ({}, *self.corpus.tried[self.size])
        ]
        finished = [run for run in tried if run is not None]
        written = {key: self.recipe.train.get(key) for key in WRITTEN}
        result: dict[str, Any] = {"metric": self.corpus.metric, "written": written, "tried": finished}
        finals: dict[str, tuple[Overrides, str]] = {"untouched": ({}, "lora-kit"), "peft": ({}, "peft")}
        if len(finished) == len(tried) > 1:
            best = max(finished, key=lambda run: self.corpus.better * run[self.corpus.metric])
            finals["tuned"] = (best["overrides"], "lora-kit")
        for stage, (overrides, program) in finals.items():
            runs = [
                self.run(overrides, judge="test", seed=seed, stage=stage, program=program)
                for seed in range(1, seeds + 1)
            ]
            result[stage] = [run for run in runs if run is not None]
        return result


def train_here(recipe: Recipe, metric: str) -> tuple[float, int]:
    """Return the metric of a trained recipe on its validation rows, and the steps."""
    report = lk.train(recipe, replace=True)
    assert report.after is not None
    return report.after.metrics()[metric], report.steps


def _with_labels_of(lines: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the rows whose label the known rows have too: with 200 rows, some of 77 labels have none."""
    labels = {json.loads(line).get("label") for line in known}
    return [line for line in lines if json.loads(line).get("label") in labels]


WRITTEN: Final = (
    *("num_train_epochs", "per_device_train_batch_size", "learning_rate", "head_learning_rate", "warmup_steps"),
)
"""Keys of the `train` section that the result records."""


def render(result: Mapping[str, Any]) -> str:
    """Return the result as tables in Markdown: what was tried, and the final runs where they are finished."""
    tried, finals = [], []
    for name, sizes in result["data"].items():
        for size, told in sizes.items():
            metric = told["metric"]
            for run in told["tried"]:
                settings = run["overrides"] or told["written"]
                tried.append(
                    [
                        name,
                        size,
                        *(_cell(settings.get(key, _UNSET.get(key))) for key in _SHOWN),
                        f"{run[metric]:.3f} {metric}",
                    ]
                )
            if any(told.get(kind) for kind in _FINALS):
                finals.append([name, size, metric, *(_summarize(told.get(kind) or [], metric) for kind in _FINALS)])
    tried = [row for place, row in enumerate(tried) if row not in tried[:place]]
    for run in result.get("screened", ()):
        settings = [_cell(run["overrides"].get(key)) for key in _SHOWN]
        tried.append(
            [run["data"], str(run["rows"]), *settings, f"{run['accuracy']:.3f} accuracy ({run['judges']} rows)"]
        )
    tables = [table(["data", "rows", "epochs", "learning rate", "of the head", "warm-up", "on other rows"], tried)]
    if finals:
        tables.append(table(["data", "rows", "judged by", *_FINALS], finals))
    return "\n\n".join(tables)


_SHOWN: Final = ("num_train_epochs", "learning_rate", "head_learning_rate", "warmup_steps")
_UNSET: Final = {"warmup_steps": 0}
_FINALS: Final = ("untouched", "tuned", "peft")


def _summarize(runs: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Return mean, least and greatest of the runs with each seed."""
    values = [run[metric] for run in runs]
    if not values:
        return "not run"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)"


def _cell(value: float | None) -> str:
    """Return a setting; one that a recipe does not have is as for the rest."""
    return "the same" if value is None else f"{value:g}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of banking77, sst2 and e2e (default: $PREPARED_DATA)")
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained encoder")
    parser.add_argument("--only", nargs="*", choices=list(CORPORA), default=list(CORPORA), metavar="NAME")
    parser.add_argument("--sizes", nargs="*", type=int, choices=SIZES, default=list(SIZES), metavar="ROWS")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), metavar="STAGE")
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
            name: {
                str(size): Bench(name, size, options).result(options.seeds)
                for size in options.sizes
                if size in CORPORA[name].tried
            }
            for name in options.only
        }
        # Single runs with fewer judges, from which the defaults were chosen; they are kept with the rest.
        screened = json.loads(RESULT.read_text(encoding="utf-8")).get("screened", []) if RESULT.exists() else []
        result = {"seeds": options.seeds, "data": data, "screened": screened, **environment()}
        RESULT.write_text(json.dumps(result, indent=2, default=asdict) + "\n", encoding="utf-8")
    fill(README, render(json.loads(RESULT.read_text(encoding="utf-8"))), mark="prepared_recipes")


if __name__ == "__main__":
    main()
