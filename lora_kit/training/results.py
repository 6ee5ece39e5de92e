"""What a training reports, and what it plans, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_kit.evaluation.measure import Evaluation
from lora_kit.training.recipe.recipe import Recipe

if TYPE_CHECKING:
    from lora_kit.training.plan.memory_estimate import MemoryEstimate


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


def build_history(report: TrainReport, log: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The log of a training: metrics before, what the Trainer logged, metrics after, and a line that sums it up."""
    entries = [entry for entry in log if "train_runtime" not in entry]
    evaluated = {entry["step"] for entry in entries if "eval_loss" in entry}
    if report.before and 0 not in evaluated:
        yield {"step": 0, **_prefix_metrics(report.before)}
    for entry in entries:
        yield {"step": entry["step"], **{key: value for key, value in entry.items() if key != "step"}}
    if report.after and report.kept not in evaluated:
        yield {"step": report.kept, **_prefix_metrics(report.after)}
    speed = round(report.tokens_per_second, 1)
    total = {"seconds": round(report.seconds, 3), "tokens": report.tokens, "tokens_per_second": speed}
    yield {"step": report.steps, "train_loss": report.train_loss, **total, "peak_bytes": report.peak_bytes}


def _prefix_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {f"eval_{key}": value for key, value in evaluation.metrics().items()}


def collect_record_metrics(report: TrainReport) -> dict[str, Any]:
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


@dataclass(frozen=True)
class TrainedModules:
    """Modules of one name: how many are trained, with how many parameters."""

    name: str
    modules: int
    parameters: int


@dataclass(frozen=True)
class DataSummary:
    """Rows of the training file as samples.

    Attributes:
        rows: of the file. samples: that are trained on in an epoch.
        tokens: of all samples. labels: on which a loss is taken.
        cut: rows that lose tokens, or become several samples, to fit `longest`.
        longest: tokens of a sample at the most.
    """

    rows: int
    samples: int
    tokens: int
    labels: int
    cut: int
    longest: int


@dataclass(frozen=True)
class StepCounts:
    """How the training goes over the data.

    Attributes:
        steps: optimiser steps. warmup: of them with a rising learning rate. per_epoch: in one pass over the data.
        batch: samples of a step. micro_batch: samples at once. accumulation: micro-batches of a step.
    """

    steps: int
    warmup: int
    per_epoch: int
    batch: int
    micro_batch: int
    accumulation: int


@dataclass(frozen=True)
class StepMeasurement:
    """Two steps that were done to see, and undone: one of the longest samples there are, then one of any.

    Attributes:
        seconds: of the second step. tokens: in it.
        peak_bytes: the most memory in both: of the CUDA device, or of the whole process where there is none.
        micro_batch: rows at once: those of the recipe, or fewer where memory ran out.
    """

    seconds: float
    tokens: int
    peak_bytes: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What a training would do.

    Attributes:
        out: where the result would be written. goes_on_from: step of the checkpoint it would begin at; 0 for anew.
        trainable, parameters: elements trained, and of the model with the adapter. kinds: where the trained ones are.
        memory: estimated, see `lora_kit.training.plan.memory_estimate`.
        measured: in two steps on this machine.
        seconds: estimated wall time of all steps, evaluations left out: all tokens at the speed of the measured step.
        recipe: as it was resolved.
    """

    out: Path
    goes_on_from: int
    trainable: int
    parameters: int
    kinds: tuple[TrainedModules, ...]
    data: DataSummary
    steps: StepCounts
    memory: MemoryEstimate
    measured: StepMeasurement
    seconds: float
    recipe: Recipe

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        fields = {name: value for name, value in vars(self).items() if name not in ("out", "recipe", "kinds")}
        plain = {name: asdict(value) if hasattr(value, "__dataclass_fields__") else value
                 for name, value in fields.items()}  # fmt: skip
        plain["memory"]["total"] = self.memory.total
        kinds = [asdict(kind) for kind in self.kinds]
        return {"out": str(self.out), **plain, "kinds": kinds, "recipe": self.recipe.to_dict()}
