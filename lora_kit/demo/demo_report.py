"""What the demo measured, as values that the screen and `demo.json` are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_kit.adapter.folder import WEIGHTS
from lora_kit.demo.demo_tasks import DemoTask
from lora_kit.evaluation.eval_report import EvalReport
from lora_kit.merging.merge_report import MergeReport
from lora_kit.training.results import TrainReport


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A trained adapter beside the base.

    Attributes:
        task: what was learned.
        training: the report of the training.
        answers: what the base and the adapter, in this order, wrote for the held-out rows.
        base_score, score: shares of them that are right, 0 to 1.
    """

    task: DemoTask
    training: TrainReport
    answers: EvalReport
    base_score: float
    score: float

    @property
    def prompts(self) -> list[str]:
        """Return the held-out prompts."""
        return [str(case.given) for case in self.answers.cases]

    @property
    def bytes(self) -> int:
        """Return the size of the weight file."""
        return (self.training.out / WEIGHTS).stat().st_size

    def to_json(self) -> dict[str, object]:
        """Return the figures as JSON values."""
        return {
            "summary": self.task.summary,
            "base_score": self.base_score,
            "score": self.score,
            "chance": self.task.chance,
            "held_out": self.answers.rows,
            "steps": self.training.steps,
            "tokens": self.training.tokens,
            "seconds": self.training.seconds,
            "parameters": self.training.trainable,
            "bytes": self.bytes,
            "digest": self.training.digest,
        }


@dataclass(frozen=True, kw_only=True)
class MixedRow:
    """One row of a batch whose rows use different adapters.

    Attributes:
        adapter: the row's adapter; None for the base.
        prompt, text: what it was asked, and what it wrote in the mixed batch.
        difference: largest absolute difference of its logits from those of the same batch under that adapter alone.
        bound: what rounding explains of it.
    """

    adapter: str | None
    prompt: str
    text: str
    difference: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Everything the demo measured.

    Attributes:
        out: the folder of everything it wrote.
        seed: of data and training.
        tasks: results by name of the task.
        swaps, swap_seconds: how many swaps were timed, and their median.
        mixed: the rows of the mixed batch.
        merged: the merge of the adapter `merged_adapter`, its logits compared.
        base_parameters: of kit-base.
        base_unchanged: whether its weights have the same bits after all of it.
        seconds: wall time of all of it.
        peak_bytes: the most memory in use.
    """

    out: Path
    seed: int
    tasks: Mapping[str, TaskResult]
    swaps: int
    swap_seconds: float
    mixed: tuple[MixedRow, ...]
    merged: MergeReport
    merged_adapter: str
    base_parameters: int
    base_unchanged: bool
    seconds: float
    peak_bytes: int

    @property
    def failures(self) -> list[str]:
        """Return what is not as promised, in words; empty where everything is."""
        poor = [
            f"{name}: adapter {result.score:.0%} right, base {result.base_score:.0%}, guessing {result.task.chance:.0%}"
            for name, result in self.tasks.items()
            if result.score <= max(result.base_score, result.task.chance)
        ]
        off = [
            f"a row of the mixed batch is {row.difference:.3g} off in a logit; the bound is {row.bound:.3g}"
            for row in self.mixed
            if not row.difference <= row.bound
        ]
        return [*poor, *off, *([] if self.base_unchanged else ["the weights of the base have changed"])]

    def to_json(self) -> dict[str, object]:
        """Return the figures as JSON values."""
        worst, logits = max(self.mixed, key=lambda row: row.difference), self.merged.logits
        assert logits is not None
        return {
            "seed": self.seed,
            "tasks": {name: result.to_json() for name, result in self.tasks.items()},
            "swaps": {"count": self.swaps, "median_seconds": self.swap_seconds},
            "mixed": {"rows": len(self.mixed), "largest_difference": worst.difference, "bound": worst.bound},
            "merged": {
                "adapter": self.merged_adapter,
                "folder": str(self.merged.out),
                "largest_difference": logits.largest_difference,
                "bound": logits.bound,
                "bytes": self.merged.bytes,
                "seconds": self.merged.seconds,
            },
            "base_parameters": self.base_parameters,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "failures": self.failures,
        }
