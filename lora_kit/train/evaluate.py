"""Loss, perplexity and accuracy over a data set. No logits are kept, and no random number is drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kit.data import Collator, Encoded
from lora_kit.train.contexts import casting, evaluating
from lora_kit.train.loss import Head, head_of


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: mean of the negative log-likelihood in nats, over labels.
        labels: what the mean is over: predicted tokens, or texts.
        samples: sequences seen.
        perplexity: exp(loss), where tokens are predicted.
        accuracy: share of texts whose likeliest label is right, where texts have one.
        seconds: wall time.
    """

    loss: float
    labels: int
    samples: int
    perplexity: float | None = None
    accuracy: float | None = None
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """`loss` and `perplexity` or `accuracy`: what repeats from run to run."""
        found = {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy}
        return {key: value for key, value in found.items() if value is not None}


def evaluate(
    model: Any,
    dataset: Encoded,
    collator: Collator,
    *,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Evaluate a model as it stands, with whatever adapter is active.

    Samples are taken in order of their length, so that little is padded; the result does not depend on the order.

    Args:
        batch_size: sequences at once.
        autocast: dtype to compute in; None for the model's own.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    tokens = dataset.kind == "token"
    options, head = ({"use_cache": False}, None) if tokens else ({}, Head(None))
    with evaluating(model), torch.no_grad():
        for batch in _batches(dataset, collator, batch_size):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with casting(device, autocast):
                head = head or head_of(model, inputs)
                with head.left_out():
                    given = model(**inputs, **options).logits
                loss += head.loss(given, labels).double()
            if not tokens:
                right += (given.argmax(-1) == labels).sum()
    count = dataset.num_labels
    mean = float(loss) / count
    return Evaluation(
        loss=mean,
        labels=count,
        samples=len(dataset),
        perplexity=_exp(mean) if tokens else None,
        accuracy=None if tokens else int(right) / count,
        seconds=time.perf_counter() - started,
    )


def _batches(dataset: Encoded, collator: Collator, size: int) -> Iterator[dict[str, Tensor]]:
    order = torch.argsort(dataset.lengths, descending=True, stable=True).tolist()
    for start in range(0, len(order), size):
        yield collator([dataset[index] for index in order[start : start + size]])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
