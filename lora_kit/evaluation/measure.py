"""The metrics of a model as it is: training measures them before, during and after."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lora_kit.data.batches import Collator, EncodedDataset
from lora_kit.evaluation.forward import run_forward
from lora_kit.evaluation.generation_metrics import GenerationTask, generate_completions
from lora_kit.evaluation.peers import NO_PEERS, Peers
from lora_kit.evaluation.sample_scores import score_samples
from lora_kit.evaluation.scores import score_texts
from lora_kit.models.frozen_prefix import PrefixStates
from lora_kit.models.tasks import GENERATIVE_KINDS, VALUE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of a model on samples.

    Attributes:
        loss: mean negative log-likelihood of a label, in nats; of numbers the mean squared error.
        labels: number of labels: predicted tokens, words, texts, or the classes of all texts.
        samples: number of samples.
        perplexity: exp(loss), if the labels are tokens; else None.
        accuracy: share of texts or words whose most likely label is right, or of texts all of whose labels are; None if
            the labels are tokens or numbers.
        further: other metrics that were requested, see `METRICS`.
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
        """Return `loss`, `perplexity` or `accuracy` or `mae`, and the further metrics; these repeat from run to run."""
        values = {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy}
        return {name: value for name, value in values.items() if value is not None} | dict(self.further)


def measure(
    model: PreTrainedModel,
    samples: EncodedDataset,
    collator: Collator,
    *,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    metrics: Sequence[str] = (),
    labels: Sequence[str] = (),
    thresholds: Sequence[float] = (),
    task: GenerationTask | None = None,
    frozen: PrefixStates | None = None,
    peers: Peers = NO_PEERS,
) -> Evaluation:
    """Measure a model with whatever adapter is active; its modes are left as they were.

    Args:
        batch_size: samples in one batch.
        autocast: dtype to compute in; None for the model's own.
        metrics: what to measure besides the loss and perplexity or accuracy; see `METRICS`.
        labels: the names of the labels, for `f1`.
        thresholds: of sets of labels: the least probability of each class that is predicted; empty for 0.5.
        task: prompts for the metrics of generated texts; its base is that of the model.
        frozen: what the model's frozen layers give for the samples; None to compute it.
        peers: processes that do the same, and share the batches.
    """
    started = time.perf_counter()
    forward = run_forward(
        model,
        samples,
        collator,
        batch_size=batch_size,
        autocast=autocast,
        thresholds=thresholds,
        frozen=frozen,
        peers=peers,
    )
    generative = samples.kind in GENERATIVE_KINDS
    further = [name for name in metrics if name not in ("loss", "perplexity", "accuracy", "mae")]
    scores: dict[str, float] = {}
    if not generative:
        basic = "mae" if samples.kind == VALUE else "accuracy"
        scores = score_samples([basic, *further], samples, forward, labels=labels)
    elif task is not None and further:
        completions = generate_completions({"": task}, batch_size=batch_size, autocast=autocast, peers=peers)[""]
        scores = score_texts(further, [completion.text for completion in completions], task.references)
    return Evaluation(
        loss=forward.loss,
        labels=samples.num_labels,
        samples=len(samples),
        perplexity=compute_perplexity(forward.loss) if generative else None,
        accuracy=scores.pop("accuracy", None),
        further=scores,
        seconds=time.perf_counter() - started,
    )


def compute_perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf
