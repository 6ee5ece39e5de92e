"""One forward pass over samples: their loss, and what is predicted of each. No logits of tokens are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX, SAMPLE_WEIGHTS, Collator, EncodedDataset
from lora_kit.evaluation.loss import LossHead, probe_head
from lora_kit.evaluation.peers import NO_PEERS, Peers, merge_results, share_work
from lora_kit.models.frozen_prefix import PrefixStates
from lora_kit.models.tasks import GENERATIVE_KINDS, LABEL, LABEL_SET, TEXT_KINDS, VALUE
from lora_kit.torch_utils import use_autocast, use_eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEFAULT_THRESHOLD: Final = 0.5
"""The least probability of a label that is predicted, where several may apply."""


@dataclass(frozen=True)
class ForwardResult:
    """The result of a pass over samples.

    Attributes:
        loss: mean negative log-likelihood of a label, in nats; of numbers the mean squared error.
        predicted: the most likely labels of each sample, or those of a set; empty if the labels are tokens to be
            written, or numbers.
        scores: of whole texts the probability of each class, or the predicted number: fp32 (samples, classes) on the
            CPU; None for tokens and words.
    """

    loss: float
    predicted: tuple[tuple[int, ...], ...]
    scores: Tensor | None = None


def run_forward(
    model: PreTrainedModel,
    samples: EncodedDataset,
    collator: Collator,
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
    thresholds: Sequence[float] = (),
    frozen: PrefixStates | None = None,
    on_rows: Callable[[int], None] | None = None,
    peers: Peers = NO_PEERS,
) -> ForwardResult:
    """Run a model over samples, with whatever adapter is active.

    Samples are taken in order of their length, so that little is padded; the result does not depend on the order. No
    random number is drawn.

    Args:
        batch_size: samples in one batch.
        autocast: dtype to compute in; None for the model's own.
        thresholds: of sets of labels: the least probability of each class that is predicted; empty for 0.5.
        frozen: what the model's frozen layers give for the samples; None to compute it.
        on_rows: called with the number of samples of each finished batch.
        peers: processes that do the same, and share the batches.
    """
    device = next(model.parameters()).device
    losses: dict[int, Tensor] = {}
    predicted: dict[int, tuple[int, ...]] = {}
    scores: dict[int, Tensor] = {}
    generative = samples.kind in GENERATIVE_KINDS
    options = {"use_cache": False} if generative else {}
    head: LossHead | None = None
    with use_eval_mode(model), torch.no_grad():
        for number, indices in share_work(batch_by_length(samples.lengths, batch_size), peers):
            batch = collator([samples[index] for index in indices])
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            inputs.pop(SAMPLE_WEIGHTS, None)  # what is measured counts each row once
            with use_autocast(device, autocast):
                head = head or probe_head(model, inputs, kind=samples.kind)
                handed_on = contextlib.nullcontext() if frozen is None else frozen.replace_layers(indices, device)
                with head.skip(), handed_on:
                    outputs = model(**inputs, **options).logits
                losses[number] = head.loss(outputs, labels).double()
            if samples.kind in TEXT_KINDS:
                scores |= zip(indices, compute_scores(outputs, samples.kind), strict=True)
            elif not generative:
                predicted |= zip(indices, _predict_word_labels(outputs, labels), strict=True)
            if on_rows is not None:
                on_rows(len(indices))
    sums = merge_results({number: float(loss) for number, loss in losses.items()}, peers)
    predicted, scores = merge_results(predicted, peers), merge_results(scores, peers)
    mean_loss = sum(sums[number] for number in sorted(sums)) / samples.num_labels
    if samples.kind not in TEXT_KINDS:
        return ForwardResult(mean_loss, tuple(predicted[index] for index in sorted(predicted)))
    ordered = torch.stack([scores[index] for index in sorted(scores)])
    return ForwardResult(mean_loss, choose_classes(ordered, samples.kind, thresholds), ordered)


def batch_by_length(lengths: Tensor, size: int) -> Iterator[list[int]]:
    """Return batches of at most `size` indices, the longest samples first."""
    order = torch.argsort(lengths, descending=True, stable=True).tolist()
    return (order[start : start + size] for start in range(0, len(order), size))


def compute_scores(logits: Tensor, kind: str) -> Tensor:
    """Return the probability of each class, or the predicted number: fp32 (rows, classes) on the CPU.

    Args:
        logits: (rows, classes).
        kind: of the samples: `label`, `label-set` or `value`.
    """
    logits = logits.detach().float()
    if kind == VALUE:
        return logits.to("cpu", copy=True)
    return (logits.sigmoid() if kind == LABEL_SET else logits.softmax(-1)).cpu()


def choose_classes(scores: Tensor, kind: str, thresholds: Sequence[float] = ()) -> tuple[tuple[int, ...], ...]:
    """Return the most likely class of each text, or all whose probability reaches their threshold.

    Args:
        scores: of `compute_scores`.
        kind: of the samples; a predicted number has no class.
        thresholds: of each class; empty for 0.5.
    """
    if kind == LABEL:
        return tuple((label,) for label in scores.argmax(-1).tolist())
    if kind == VALUE:
        return ()
    limits = torch.tensor(thresholds or [DEFAULT_THRESHOLD] * scores.shape[1])
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in scores >= limits)


def _predict_word_labels(logits: Tensor, labels: Tensor) -> list[tuple[int, ...]]:
    """Return the most likely class of each position that has a label.

    Args:
        logits: (rows, length, classes) with labels (rows, length).
    """
    classes = logits.argmax(-1)
    return [tuple(row[has_label].tolist()) for row, has_label in zip(classes, labels != IGNORE_INDEX, strict=True)]
