"""Metrics of a forward pass over samples with labels: whichever the kind of the samples has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from lora_kit.data.batches import IGNORE_INDEX, EncodedDataset
from lora_kit.evaluation.forward import ForwardResult
from lora_kit.evaluation.scores import score_labels
from lora_kit.evaluation.statistics import (
    compute_auroc,
    compute_mean_absolute_error,
    compute_pearson,
    compute_spearman,
)
from lora_kit.models.tasks import LABEL_SET, VALUE

_NUMBER_METRICS: Final[Mapping[str, Callable[[Tensor, Tensor], float]]] = {
    "mae": compute_mean_absolute_error,
    "pearson": compute_pearson,
    "spearman": compute_spearman,
}


def score_samples(
    names: Sequence[str], samples: EncodedDataset, forward: ForwardResult, *, labels: Sequence[str]
) -> dict[str, float]:
    """Return metrics of a pass over samples, by name; `f1_per_label` has one value for each label.

    Args:
        names: the metrics to compute; the loss is not one of them.
        samples: what the pass was over: labels of texts or words, or numbers.
        forward: the result of the pass.
        labels: the names of the classes.
    """
    if samples.kind == VALUE:
        assert forward.scores is not None
        return {name: _NUMBER_METRICS[name](forward.scores[:, 0], samples.labels) for name in names}
    true = collect_true_labels(samples)
    of_labels = [name for name in names if name != "auroc"]
    values = score_labels(of_labels, true, forward.predicted, labels=labels, is_set=samples.kind == LABEL_SET)
    if "auroc" in names:
        assert forward.scores is not None
        values["auroc"] = _compute_mean_auroc(forward.scores, true)
    return values


def collect_true_labels(samples: EncodedDataset) -> list[list[int]]:
    """Return the classes of each sample, without `IGNORE_INDEX`; none for numbers."""
    ends = samples.label_offsets.tolist()
    rows = [samples.labels[start:end] for start, end in pairwise(ends)]
    if samples.kind == LABEL_SET:
        return [row.nonzero().flatten().tolist() for row in rows]
    return [row[row != IGNORE_INDEX].tolist() for row in rows]


def _compute_mean_auroc(scores: Tensor, true: Sequence[Sequence[int]]) -> float:
    """Return the AUROC: of two classes that of the second, else the mean over the classes that have one.

    A class has one if some texts have it and others do not.
    """
    has_label = torch.zeros(scores.shape, dtype=torch.bool)
    for row, classes in enumerate(true):
        has_label[row, list(classes)] = True
    values = [compute_auroc(scores[:, number], has_label[:, number]) for number in range(scores.shape[1])]
    if scores.shape[1] == 2 and all(len(classes) == 1 for classes in true):
        return values[1]
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan
