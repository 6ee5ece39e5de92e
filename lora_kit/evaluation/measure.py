"""The metrics of a model as it stands: what training asks for before, within and after."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset
from lora_kit.evaluation.forward import run_forward
from lora_kit.evaluation.generation_metrics import GenerationTask, generate_completions
from lora_kit.evaluation.scores import score_labels, score_texts
from lora_kit.models.tasks import GENERATIVE_KINDS


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: mean of the negative log-likelihood in nats, over labels.
        labels: what the mean is over: predicted tokens, words or texts.
        samples: sequences seen.
        perplexity: exp(loss), where tokens are predicted.
        accuracy: share of texts or words whose likeliest label is right, where they have one.
        further: other metrics that were asked for, see `METRICS`.
        seconds: wall time.
    """

    loss: float
    labels: int
    samples: int
    perplexity: float | None = None
    accuracy: float | None = None
    further: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """`loss`, `perplexity` or `accuracy`, and what else was asked for: what repeats from run to run."""
        found = {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy}
        return {key: value for key, value in found.items() if value is not None} | dict(self.further)


def measure(
    model: Any,
    samples: EncodedDataset,
    collator: Collator,
    *,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    metrics: Sequence[str] = (),
    labels: Sequence[str] = (),
    exam: GenerationTask | None = None,
) -> Evaluation:
    """Evaluate a model as it stands, with whatever adapter is active; it is left in the modes it was in.

    Args:
        batch_size: samples at once.
        autocast: dtype to compute in; None for the model's own.
        metrics: what to give besides the loss and perplexity or accuracy; see `METRICS`.
        labels: the names of the labels, for `f1`.
        exam: what the model is asked, for metrics of what it writes; of the base whose model it is.
    """
    started = time.perf_counter()
    found = run_forward(model, samples, collator, batch_size=batch_size, autocast=autocast)
    written = samples.kind in GENERATIVE_KINDS
    further = [name for name in metrics if name not in ("loss", "perplexity", "accuracy")]
    scores: dict[str, float] = {}
    if not written:
        scores = score_labels(["accuracy", *further], true_labels_of(samples), found.predicted, labels=labels)
    elif exam is not None and further:
        texts = generate_completions({"": exam}, batch_size=batch_size, autocast=autocast)[""]
        scores = score_texts(further, [each.text for each in texts], exam.references)
    return Evaluation(
        loss=found.loss,
        labels=samples.num_labels,
        samples=len(samples),
        perplexity=compute_perplexity(found.loss) if written else None,
        accuracy=scores.pop("accuracy", None),
        further=scores,
        seconds=time.perf_counter() - started,
    )


def true_labels_of(samples: EncodedDataset) -> list[list[int]]:
    """The labels of each sample."""
    ends = samples.label_offsets.tolist()
    rows = [samples.labels[start:end] for start, end in pairwise(ends)]
    return [row[row != IGNORE_INDEX].tolist() for row in rows]


def compute_perplexity(loss: float) -> float:
    """exp(loss); infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
