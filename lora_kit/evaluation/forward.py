"""One forward pass over samples: their loss, and the predicted label of each. No logits are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX, Collator, EncodedDataset
from lora_kit.evaluation.loss import LossHead, probe_head
from lora_kit.models.tasks import GENERATIVE_KINDS
from lora_kit.torch_utils import use_autocast, use_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ForwardResult:
    """The result of a pass over samples.

    Attributes:
        loss: mean negative log-likelihood of a label, in nats.
        predicted: the most likely labels of each sample; empty if the labels are tokens to be written.
    """

    loss: float
    predicted: tuple[tuple[int, ...], ...]


def run_forward(
    model: PreTrainedModel,
    samples: EncodedDataset,
    collator: Collator,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> ForwardResult:
    """Run a model over samples, with whatever adapter is active.

    Samples are taken in order of their length, so that little is padded; the result does not depend on the order. No
    random number is drawn.

    Args:
        batch_size: samples in one batch.
        autocast: dtype to compute in; None for the model's own.
        on_rows: called with the number of samples of each finished batch.
    """
    device = next(model.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    predicted: dict[int, tuple[int, ...]] = {}
    generative = samples.kind in GENERATIVE_KINDS
    options = {"use_cache": False} if generative else {}
    head: LossHead | None = None
    with use_eval_mode(model), torch.no_grad():
        for indices in batch_by_length(samples.lengths, batch_size):
            batch = collator([samples[index] for index in indices])
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            with use_autocast(device, autocast):
                head = head or probe_head(model, inputs, kind=samples.kind)
                with head.skip():
                    outputs = model(**inputs, **options).logits
                loss += head.loss(outputs, labels).double()
            if not generative:
                predicted |= dict(zip(indices, _predict_labels(outputs, labels), strict=True))
            if on_rows is not None:
                on_rows(len(indices))
    return ForwardResult(float(loss) / samples.num_labels, tuple(predicted[index] for index in sorted(predicted)))


def batch_by_length(lengths: Tensor, size: int) -> Iterator[list[int]]:
    """Return batches of at most `size` indices, the longest samples first."""
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    return (order[start : start + size] for start in range(0, len(order), size))


def _predict_labels(logits: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
    """Return the most likely class of each row, or of each position that has a label.

    Args:
        logits: (rows, classes) with labels (rows,), or (rows, length, classes) with labels (rows, length).
    """
    classes = logits.argmax(-1)
    if labels.ndim == 1:
        return [(label,) for label in classes.tolist()]
    return [tuple(row[has_label].tolist()) for row, has_label in zip(classes, labels != IGNORE_INDEX, strict=True)]
