"""Loss, perplexity and accuracy over a data set. No logits are kept, and no random number is drawn."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lora_kit.data import IGNORED, Collator, Encoded


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
    with _evaluating(model), torch.no_grad():
        for batch in _batches(dataset, collator, batch_size):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with casting(device, autocast):
                logits = model(**inputs, use_cache=False).logits if dataset.kind == "token" else model(**inputs).logits
            loss += summed_loss(logits, labels).double()
            if dataset.kind == "label":
                right += (logits.argmax(-1) == labels).sum()
    count = dataset.num_labels
    mean = float(loss) / count
    return Evaluation(
        loss=mean,
        labels=count,
        samples=len(dataset),
        perplexity=_exp(mean) if dataset.kind == "token" else None,
        accuracy=int(right) / count if dataset.kind == "label" else None,
        seconds=time.perf_counter() - started,
    )


def summed_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """The negative log-likelihood of the labels, summed: fp32 ().

    Tokens are predicted from the position before them; rows without a label are dropped before logits become fp32.

    Args:
        logits: (rows, length, vocabulary) with labels (rows, length), or (rows, classes) with labels (rows,).
        smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv 1512.00567).
    """
    if labels.ndim == 2:
        kept = labels[:, 1:] != IGNORED
        logits, labels = logits[:, :-1][kept], labels[:, 1:][kept]
    return functional.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)


def casting(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to a dtype, or nothing."""
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def _batches(dataset: Encoded, collator: Collator, size: int) -> Iterator[dict[str, Tensor]]:
    order = torch.argsort(dataset.lengths, descending=True, stable=True).tolist()
    for start in range(0, len(order), size):
        yield collator([dataset[index] for index in order[start : start + size]])


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode within, every module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
