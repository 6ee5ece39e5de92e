"""What the demo found, as values that the screen, the picture and `demo.json` are made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_kit.demo.demo_tasks import Task
from lora_kit.merging.merge_report import MergeReport
from lora_kit.training.results import TrainReport

ROUNDING: Final = 1e-4
"""Share of the largest logit by which two orders of the same fp32 sums may differ; a hundred times what is usual."""
SWAP_SECONDS: Final = 50e-6
"""What the median swap is meant to stay under. It is shown, not judged: a machine may be busy with something else."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One task: its adapter, and base and adapter on the held-out rows.

    Attributes:
        task: what was learned.
        report: of the training.
        bytes: size of the weight file.
        prompts: the held-out prompts.
        base_texts, texts: what base and adapter wrote for them.
        base_score, score: shares of them that are right, 0 to 1.
    """

    task: Task
    report: TrainReport
    bytes: int
    prompts: tuple[str, ...]
    base_texts: tuple[str, ...]
    texts: tuple[str, ...]
    base_score: float
    score: float

    @property
    def beats_base(self) -> bool:
        """Whether the adapter is better than the base, and than guessing."""
        return self.score > max(self.base_score, self.task.chance)

    def to_json(self) -> dict[str, Any]:
        report = self.report
        return {
            "summary": self.task.summary,
            "base_score": self.base_score,
            "score": self.score,
            "chance": self.task.chance,
            "held_out": len(self.prompts),
            "steps": report.steps,
            "tokens": report.tokens,
            "seconds": report.seconds,
            "parameters": report.trainable,
            "bytes": self.bytes,
            "digest": report.digest,
        }


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """Times of `bank.use` between resident adapters."""

    count: int
    median_seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "median_seconds": self.median_seconds}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two ways to the same logits.

    Attributes:
        difference: the largest absolute difference of a logit.
        largest_logit: what it is to be compared with.
    """

    difference: float
    largest_logit: float

    @property
    def bound(self) -> float:
        return ROUNDING * self.largest_logit

    @property
    def holds(self) -> bool:
        return self.difference <= self.bound

    def to_json(self) -> dict[str, Any]:
        return {"largest_difference": self.difference, "bound": self.bound}


@dataclass(frozen=True, kw_only=True)
class MixedRow:
    """One row of a batch in which rows have adapters of their own.

    Attributes:
        adapter: its adapter; None for the base.
        prompt, text: what it was asked, and what it wrote in the mixed batch.
        difference: largest absolute difference of its logits from those of the same batch under that adapter alone.
    """

    adapter: str | None
    prompt: str
    text: str
    difference: float


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A mixed batch beside the same rows under one adapter each."""

    rows: tuple[MixedRow, ...]
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        return {"rows": len(self.rows), **self.agreement.to_json()}


@dataclass(frozen=True, kw_only=True)
class Merged:
    """An adapter folded into a copy of the base, beside base + adapter on the same prompts.

    Attributes:
        name: the adapter.
        report: of the merge, which proves what it wrote.
        prompts: how many held-out prompts both were given.
        agreement: of the two.
    """

    name: str
    report: MergeReport
    prompts: int
    agreement: Agreement

    def to_json(self) -> dict[str, Any]:
        return {
            "adapter": self.name,
            "folder": str(self.report.out),
            "prompts": self.prompts,
            **self.agreement.to_json(),
            "bytes": self.report.bytes,
            "seconds": self.report.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Everything the demo found.

    Attributes:
        out: the folder of all it made.
        seed: of data and training.
        trained: by task.
        swaps, mixed, merged: what was done with the adapters.
        base_parameters: of kit-base.
        base_unchanged: whether its weights are the same bits after all of it.
        seconds: wall time of all of it.
        peak_bytes: the most memory the process had in use.
        picture: the PNG; None where matplotlib is not installed.
    """

    out: Path
    seed: int
    trained: Mapping[str, Trained]
    swaps: Swaps
    mixed: Mixed
    merged: Merged
    base_parameters: int
    base_unchanged: bool
    seconds: float
    peak_bytes: int
    picture: Path | None

    @property
    def failures(self) -> list[str]:
        """What is not as it must be, in words; empty where all is."""
        failed = [
            f"{name}: adapter {found.score:.0%} right, base {found.base_score:.0%}, guessing {found.task.chance:.0%}"
            for name, found in self.trained.items()
            if not found.beats_base
        ]
        compared = {"a row of the mixed batch": self.mixed.agreement, "the merged model": self.merged.agreement}
        for what, found in compared.items():
            if not found.holds:
                failed.append(f"{what} is {found.difference:.3g} off in a logit; the bound is {found.bound:.3g}")
        if not self.base_unchanged:
            failed.append("the weights of the base have changed")
        return failed

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        figures = {
            "seed": self.seed,
            "tasks": {name: found.to_json() for name, found in self.trained.items()},
            "swaps": self.swaps.to_json(),
            "mixed": self.mixed.to_json(),
            "merged": self.merged.to_json(),
            "base_parameters": self.base_parameters,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "failures": self.failures,
        }
        return dict(json.loads(json.dumps(figures)))
