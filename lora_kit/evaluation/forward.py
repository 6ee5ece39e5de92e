"""One pass over samples: the loss of all of them, and the label that each would be given. No logits are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORED, WRITTEN, Collator, Encoded
from lora_kit.evaluation.loss import Head, head_of
from lora_kit.torch_utils import casting, evaluating


@dataclass(frozen=True)
class Forward:
    """What a pass over samples found.

    Attributes:
        loss: mean of the negative log-likelihood in nats, over labels.
        predicted: the likeliest labels of each sample, where it has labels that are not written; else empty.
    """

    loss: float
    predicted: tuple[tuple[int, ...], ...]


def forward(
    model: Any,
    samples: Encoded,
    collator: Collator,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> Forward:
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
    written = samples.kind in WRITTEN
    options = {"use_cache": False} if written else {}
    head: Head | None = None
    with evaluating(model), torch.no_grad():
        for chosen in in_order_of_length(samples.lengths, batch_size):
            batch = collator([samples[index] for index in chosen])
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with casting(device, autocast):
                head = head or head_of(model, inputs, kind=samples.kind)
                with head.left_out():
                    given = model(**inputs, **options).logits
                loss += head.loss(given, labels).double()
            if not written:
                predicted |= dict(zip(chosen, _likeliest(given, labels), strict=True))
            if on_rows is not None:
                on_rows(len(chosen))
    return Forward(float(loss) / samples.num_labels, tuple(predicted[index] for index in sorted(predicted)))


def in_order_of_length(lengths: Tensor, size: int) -> Iterator[list[int]]:
    """Batches of at most `size` places, the longest first."""
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    return (order[start : start + size] for start in range(0, len(order), size))


def _likeliest(logits: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
    """The likeliest class of each row, (rows, classes), or of each position with a label, (rows, length, classes)."""
    found = logits.argmax(-1)
    if labels.ndim == 1:
        return [(label,) for label in found.tolist()]
    return [tuple(row[kept].tolist()) for row, kept in zip(found, labels != IGNORED, strict=True)]
