"""One pass over samples: the loss of all of them, and the label that each would be given. No logits are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset
from lora_kit.evaluation.loss import LossHead, probe_head
from lora_kit.models.tasks import GENERATIVE_KINDS
from lora_kit.torch_utils import use_autocast, use_eval_mode


@dataclass(frozen=True)
class ForwardResult:
    """What a pass over samples found.

    Attributes:
        loss: mean of the negative log-likelihood in nats, over labels.
        predicted: the likeliest labels of each sample, where it has labels that are not written; else empty.
    """

    loss: float
    predicted: tuple[tuple[int, ...], ...]


def run_forward(
    model: Any,
    samples: EncodedDataset,
    collator: Collator,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> ForwardResult:
    """Run a model over samples as it stands, with whatever adapter is active.

    Samples are taken in order of their length, so that little is padded; the result does not depend on the order. No
    random number is drawn.

    Args:
        batch_size: samples at once.
        autocast: dtype to compute in; None for the model's own.
        on_rows: called with the number of samples of each batch that is done.
    """
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    predicted: dict[int, tuple[int, ...]] = {}
    written = samples.kind in GENERATIVE_KINDS
    options = {"use_cache": False} if written else {}
    head: LossHead | None = None
    with use_eval_mode(model), torch.no_grad():
        for chosen in batch_by_length(samples.lengths, batch_size):
            batch = collator([samples[index] for index in chosen])
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with use_autocast(device, autocast):
                head = head or probe_head(model, inputs, kind=samples.kind)
                with head.left_out():
                    given = model(**inputs, **options).logits
                loss += head.loss(given, labels).double()
            if not written:
                predicted |= dict(zip(chosen, _predict_labels(given, labels), strict=True))
            if on_rows is not None:
                on_rows(len(chosen))
    return ForwardResult(float(loss) / samples.num_labels, tuple(predicted[index] for index in sorted(predicted)))


def batch_by_length(lengths: Tensor, size: int) -> Iterator[list[int]]:
    """Batches of at most `size` places, the longest first."""
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    return (order[start : start + size] for start in range(0, len(order), size))


def _predict_labels(logits: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
    """The likeliest class of each row, (rows, classes), or of each position with a label, (rows, length, classes)."""
    found = logits.argmax(-1)
    if labels.ndim == 1:
        return [(label,) for label in found.tolist()]
    return [tuple(row[kept].tolist()) for row, kept in zip(found, labels != IGNORE_INDEX, strict=True)]
