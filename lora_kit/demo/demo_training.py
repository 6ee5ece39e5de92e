"""The trainings of the demo: an adapter for each task, scored beside the base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from lora_kit.adapter.adapter import Adapter
from lora_kit.adapter.adapter_record import RECORD
from lora_kit.adapter.folder import CARD, CONFIG, WEIGHTS
from lora_kit.config.lora_config import LoraConfig
from lora_kit.demo.demo_report import TaskResult
from lora_kit.demo.demo_tasks import TASKS, DemoRow
from lora_kit.evaluation.eval_report import EvalReport
from lora_kit.evaluation.evaluate import evaluate
from lora_kit.models.loading import Base, load_base
from lora_kit.names import KIT_BASE
from lora_kit.training.recipe.recipe import DataSpec, Recipe
from lora_kit.training.train import train

RANK: Final = 8
BATCH: Final = 8
STEPS: Final[Mapping[str, int]] = {"scene": 280, "pirate": 380, "mood": 200}
"""Optimizer steps of `BATCH` rows after which kit-base has learned each task."""
HELD_OUT: Final = 64
NEW_TOKENS: Final = 40
"""More than any right answer has."""


def load_demo_base() -> Base:
    """Load kit-base in fp32: on a CPU the quickest, and figures are those of fp32 on every device."""
    return load_base(KIT_BASE, dtype="fp32")


def build_recipe(data: Path, out: Path, *, steps: int, seed: int) -> Recipe:
    """Return the recipe of a demo adapter: small batches, since so small a model learns by the number of steps."""
    return Recipe(
        base=KIT_BASE,
        data=DataSpec(train=str(data)),
        out=str(out),
        lora=LoraConfig(r=RANK, lora_alpha=2 * RANK),
        train={
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "linear",
            "warmup_steps": 10,
            "adam_beta2": 0.98,
            "weight_decay": 0.0,
            "logging_steps": min(10, steps),
            "seed": seed,
        },
    )


def train_tasks(
    base: Base, *, out: Path, seed: int, steps: Mapping[str, int], held_out: int, epochs: int = 1
) -> Iterator[TaskResult]:
    """Train an adapter for each task, one after another, and score each beside the base as soon as it is there.

    Args:
        out: gets the adapters' folders, each with its scores in its record, and their rows in `data`.
        steps: of an epoch, by task; each takes `BATCH` rows that are new.
        held_out: rows per task to score on.
        epochs: how often all rows are used.
    """
    for name, count in steps.items():
        train_rows, held_out_rows = TASKS[name].split(train=BATCH * count, held_out=held_out, seed=seed)
        file = _write_rows(train_rows, out / "data" / name / "train.jsonl")
        questions = _write_rows(held_out_rows, out / "data" / name / "held_out.jsonl")
        report = train(build_recipe(file, out / name, steps=epochs * count, seed=seed), base=base, replace=True)
        answers = answer_rows(base, report.out, questions)
        base_score, score = (result.metrics["exact_match"] for result in answers.results)
        copy_adapter(report.out, report.out, metrics={"held_out_right": score, "held_out_right_base": base_score})
        yield TaskResult(task=TASKS[name], training=report, answers=answers, base_score=base_score, score=score)


def answer_rows(base: Base, adapter: Path, rows: Path) -> EvalReport:
    """Let the base and an adapter answer each prompt of a file, greedily."""
    return evaluate(base, [None, adapter], rows, metrics=["exact_match"], batch_size=64, max_new_tokens=NEW_TOKENS)


def copy_adapter(source: Path, target: Path, *, metrics: Mapping[str, float] | None = None) -> None:
    """Write an adapter folder again, with everything else in it and further metrics in its record."""
    own = (CARD, CONFIG, RECORD, WEIGHTS)
    others = {file.name: file.read_bytes() for file in sorted(source.iterdir()) if file.name not in own}
    adapter = Adapter.load(source)
    record = {"metrics": {**adapter.record["metrics"], **(metrics or {})}}
    adapter.save(target, record=record, files=others, replace=True)


def _write_rows(rows: Sequence[DemoRow], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows), encoding="utf-8")
    return file
