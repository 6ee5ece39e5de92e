"""What a training did: its report, its log line by line, and what goes into the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.evaluate import Evaluation
from lora_kit.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training did.

    Attributes:
        out: the folder of the result.
        method, task: of the recipe.
        steps: optimiser steps.
        kept: the step whose weights were kept: the best one where the recipe says so, else the last.
        resumed: the step it went on from after it had been stopped; 0 where it had not.
        seconds: wall time of the training, without loading and evaluation.
        tokens: tokens trained on, padding left out, each time they were seen.
        peak_bytes: the most memory in use: of the CUDA device, or of the whole process where there is none.
        micro_batch: rows at once in the last step: the recipe's, or fewer where memory ran out.
        trainable, parameters: elements trained, and of the model with the adapter.
        train_loss: mean training loss over the last logging interval, in nats per label.
        before, after: metrics on the validation file; None where the recipe names none.
        history: the log, entry by entry, as in metrics.jsonl.
        digest: identity of the adapter; None for `full`.
        recipe: as it was resolved.
    """

    out: Path
    method: str
    task: str
    steps: int
    kept: int
    resumed: int
    seconds: float
    tokens: int
    peak_bytes: int
    micro_batch: int
    trainable: int
    parameters: int
    train_loss: float
    before: Evaluation | None
    after: Evaluation | None
    history: tuple[Mapping[str, Any], ...]
    digest: str | None
    recipe: Recipe

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def history(report: TrainReport, log: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The log of a training: metrics before, what the Trainer logged, metrics after, and a line that sums it up."""
    entries = [entry for entry in log if "train_runtime" not in entry]
    evaluated = {entry["step"] for entry in entries if "eval_loss" in entry}
    if report.before and 0 not in evaluated:
        yield {"step": 0, **_prefixed(report.before)}
    for entry in entries:
        yield {"step": entry["step"], **{key: value for key, value in entry.items() if key != "step"}}
    if report.after and report.kept not in evaluated:
        yield {"step": report.kept, **_prefixed(report.after)}
    speed = round(report.tokens_per_second, 1)
    total = {"seconds": round(report.seconds, 3), "tokens": report.tokens, "tokens_per_second": speed}
    yield {"step": report.steps, "train_loss": report.train_loss, **total, "peak_bytes": report.peak_bytes}


def _prefixed(evaluation: Evaluation) -> dict[str, float]:
    return {f"eval_{key}": value for key, value in evaluation.metrics().items()}


def metrics(report: TrainReport) -> dict[str, Any]:
    """What goes into the adapter's record: nothing that changes from run to run."""
    found: dict[str, Any] = {"steps": report.steps, "tokens": report.tokens, "train_loss": report.train_loss}
    if report.kept != report.steps:
        found["best_step"] = report.kept
    if report.micro_batch < report.recipe.train.get("per_device_train_batch_size", report.micro_batch):
        found["micro_batch"] = report.micro_batch
    if report.before and report.after:
        found |= report.after.metrics()
        found |= {f"{key}_before": value for key, value in report.before.metrics().items()}
    return found
