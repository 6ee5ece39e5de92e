"""The results of `train` and `plan`, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from lora_kit.errors import LoraKitError
from lora_kit.evaluation.measure import Evaluation
from lora_kit.runs.run_files import LogEntry
from lora_kit.training.recipe.recipe import Recipe

if TYPE_CHECKING:
    from lora_kit.training.plan.memory_use import MemoryUse


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training did.

    Attributes:
        out: folder of the result.
        method: of the recipe.
        task: of the recipe.
        steps: optimizer steps.
        kept: step of the weights that were kept: the best one where the recipe says so, else the last.
        resumed: step of the checkpoint that the training resumed from; 0 where it was not stopped.
        seconds: wall time of the training, without loading and evaluations.
        tokens: tokens trained on in all epochs, without padding.
        peak_bytes: peak memory of the CUDA device, or of the whole process without one.
        micro_batch: rows of a forward pass in the last step: the recipe's, or fewer where memory ran out.
        processes: number of processes that shared the rows of each batch.
        trainable: number of trained parameters.
        parameters: number of parameters of the model with the adapter.
        train_loss: mean training loss over the last logging interval, in nats per label.
        before: metrics on the validation file before training; None where the recipe has none.
        after: metrics on the validation file after training; None where the recipe has none.
        thresholds: where any number of labels apply: the least probability of each that is predicted, chosen on the
            validation file for the best F1; `after` is measured with them. Empty for 0.5.
        text_pairs: whether each row has two texts.
        history: the entries of the log, as in metrics.jsonl.
        planned: optimizer steps that were to be done, where a checkpoint was kept as the result; else None.
        max_steps: optimizer steps that the recipe asks for; 0 where that is not known.
        digest: identity of the adapter; None for `full`.
        recipe: with every value that was left open filled in.
        frozen: what became of the frozen layers below the trained ones, in words; None for the loops of TRL.
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
    thresholds: tuple[float, ...] = ()
    text_pairs: bool = False
    history: tuple[LogEntry, ...]
    planned: int | None = None
    digest: str | None
    recipe: Recipe
    processes: int = 1
    max_steps: int = 0
    frozen: str | None = None

    @property
    def is_stopped_early(self) -> bool:
        """Whether early stopping ended the training before the steps that the recipe asks for."""
        return self.planned is None and self.steps < self.max_steps

    @property
    def tokens_per_second(self) -> float:
        """The speed of the training, over all steps."""
        return self.tokens / self.seconds

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON values, without the log and the recipe, which files beside the adapter hold."""
        names = ("method", "task", "steps", "kept", "resumed", "seconds", "tokens", "peak_bytes", "micro_batch",
                 "processes", "trainable", "parameters", "train_loss", "digest")  # fmt: skip
        metrics = {name: getattr(self, name) for name in ("before", "after")}
        return {
            "out": str(self.out),
            **{name: getattr(self, name) for name in names},
            **{name: None if each is None else each.metrics() for name, each in metrics.items()},
        }


class PartialTrainingError(LoraKitError, RuntimeError):
    """Some of several trainings failed; the others were saved.

    Attributes:
        errors: by the output of the training that failed.
        reports: of those that did not fail.
    """

    def __init__(self, errors: Mapping[str, Exception], reports: Sequence[TrainReport]) -> None:
        count = len(errors) + len(reports)
        lines = [f"{out}: {' '.join(str(error).split())}" for out, error in errors.items()]
        super().__init__("\n  ".join([f"{len(errors)} of {count} trainings failed:", *lines]))
        self.errors, self.reports = errors, reports
        # The worst: 1 is for what is no error of this family.
        self.exit_code = max(error.exit_code if isinstance(error, LoraKitError) else 1 for error in errors.values())


def build_history(report: TrainReport, log: Sequence[LogEntry]) -> Iterator[LogEntry]:
    """Yield the log of a training: metrics before, the Trainer's entries, metrics after, and a summary."""
    yield from list_log_entries(report.before, log)
    if report.after and report.kept not in _list_evaluated_steps(log):
        yield {"step": report.kept, **_prefix_metrics(report.after)}
    speed = round(report.tokens_per_second, 1)
    total = {"seconds": round(report.seconds, 3), "tokens": report.tokens, "tokens_per_second": speed}
    yield {"step": report.steps, "train_loss": report.train_loss, **total, "peak_bytes": report.peak_bytes}


def list_log_entries(before: Evaluation | None, log: Sequence[LogEntry]) -> Iterator[LogEntry]:
    """Yield the metrics before training, unless they are in the log, and the Trainer's entries without its summary."""
    if before and 0 not in _list_evaluated_steps(log):
        yield {"step": 0, **_prefix_metrics(before)}
    for entry in log:
        if "train_loss" not in entry:
            yield {"step": entry["step"], **{key: value for key, value in entry.items() if key != "step"}}


def _list_evaluated_steps(log: Sequence[LogEntry]) -> set[int]:
    return {entry["step"] for entry in log if "eval_loss" in entry and "train_loss" not in entry}


def _prefix_metrics(evaluation: Evaluation) -> dict[str, float]:
    return {f"eval_{key}": value for key, value in evaluation.metrics().items()}


def collect_record_metrics(report: TrainReport) -> dict[str, float]:
    """Return the metrics of an adapter's record: those that are the same in every run of a recipe."""
    metrics: dict[str, float] = {"steps": report.steps, "tokens": report.tokens, "train_loss": report.train_loss}
    if report.kept != report.steps:
        metrics["best_step"] = report.kept
    if report.micro_batch < report.recipe.train.get("per_device_train_batch_size", report.micro_batch):
        metrics["micro_batch"] = report.micro_batch
    if report.processes > 1:
        metrics["processes"] = report.processes
    if report.before and report.after:
        metrics |= report.after.metrics()
        metrics |= {f"{key}_before": value for key, value in report.before.metrics().items()}
    return metrics


@dataclass(frozen=True)
class TrainedModules:
    """The trained modules of one name.

    Attributes:
        name: the last part of their paths.
        modules: how many there are.
        parameters: trained parameters of all of them.
    """

    name: str
    modules: int
    parameters: int


@dataclass(frozen=True)
class DataSummary:
    """The training file, as samples.

    Attributes:
        rows: rows of the file.
        samples: samples of an epoch.
        tokens: tokens of all samples.
        labels: labels of all samples, over which the loss is a mean.
        cut: rows that lose tokens, or become several samples, to fit `longest`.
        divided: conversations in which answers have samples of their own, since they are rendered differently later on.
        longest: tokens of a sample, at most.
    """

    rows: int
    samples: int
    tokens: int
    labels: int
    cut: int
    divided: int
    longest: int


@dataclass(frozen=True)
class StepCounts:
    """The steps of a training.

    Attributes:
        steps: optimizer steps.
        warmup: steps with a rising learning rate.
        per_epoch: steps of one pass over the data.
        batch: samples of a step.
        micro_batch: samples of a forward pass.
        accumulation: forward passes of a step, in each process.
        processes: number of processes that share the samples of a step.
    """

    steps: int
    warmup: int
    per_epoch: int
    batch: int
    micro_batch: int
    accumulation: int
    processes: int = 1


@dataclass(frozen=True)
class StepMeasurement:
    """A dry run of two steps: one of the longest samples, then one of random samples.

    Attributes:
        seconds: wall time of the second step.
        tokens: of the second step.
        peak_bytes: peak memory of both steps: of the CUDA device, or of the whole process without one.
        peak_of: which of the two it is.
        before_bytes: the same before the first step.
        micro_batch: rows of a forward pass: the recipe's, or fewer where memory ran out.
    """

    seconds: float
    tokens: int
    peak_bytes: int
    peak_of: Literal["device", "process"]
    before_bytes: int
    micro_batch: int


_KEPT_BY_ALLOCATOR: Final = 2


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What a training would do.

    Attributes:
        out: folder of the result.
        goes_on_from: step of the checkpoint that the training would resume from; 0 without one.
        trainable: number of trained parameters.
        parameters: number of parameters of the model with the adapter.
        kinds: the trained modules by name.
        head: what becomes of the base's head, in words; None where the task has no labels.
        frozen: what becomes of the frozen layers below the trained ones, in words; None for the loops of TRL.
        data: the training file, as samples.
        steps: how many there are, and of how many samples.
        memory: counted, see `lora_kit.training.plan.memory_use`.
        measured: two steps on this machine.
        seconds: estimated wall time of all steps, without evaluations: all tokens at the speed of the measured step.
        recipe: with every value that was left open filled in.
    """

    out: Path
    goes_on_from: int
    trainable: int
    parameters: int
    kinds: tuple[TrainedModules, ...]
    head: str | None
    frozen: str | None
    data: DataSummary
    steps: StepCounts
    memory: MemoryUse
    measured: StepMeasurement
    seconds: float
    recipe: Recipe

    @property
    def most_bytes(self) -> int:
        """The most memory that the training takes: of the device what is counted, or of the whole process.

        A process has what it has before the first step. What a step adds counts twice there, since the C library keeps
        memory of batches of one shape that those of another do not fit into: 1.7 times as much was seen.
        """
        if self.measured.peak_of == "device":
            return max(self.memory.total, self.measured.peak_bytes)
        added = self.memory.total - self.memory.weights
        return max(self.measured.before_bytes + _KEPT_BY_ALLOCATOR * added, self.measured.peak_bytes)

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        return {
            "out": str(self.out),
            "goes_on_from": self.goes_on_from,
            "trainable": self.trainable,
            "parameters": self.parameters,
            "head": self.head,
            "frozen": self.frozen,
            "data": asdict(self.data),
            "steps": asdict(self.steps),
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "measured": asdict(self.measured),
            "most_bytes": self.most_bytes,
            "seconds": self.seconds,
            "kinds": [asdict(kind) for kind in self.kinds],
            "recipe": self.recipe.to_dict(),
        }
