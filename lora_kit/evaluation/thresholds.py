"""Thresholds of labels of which any number may apply, chosen for the best F1 on validation rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kit.evaluation.forward import DEFAULT_THRESHOLD


def choose_thresholds(scores: Tensor, labels: Tensor) -> tuple[float, ...]:
    """Return for each class the threshold with the greatest F1; of several the nearest to 0.5.

    Candidates are 0.5 and the middle between each two neighboring probabilities. A class that no text has, or all have,
    keeps 0.5: nothing can be learned about it.

    Args:
        scores: probabilities: (texts, classes).
        labels: 0 or 1 for each class: (texts, classes).
    """
    columns = zip(scores.double().unbind(1), labels.bool().unbind(1), strict=True)
    return tuple(_choose_threshold(score, has_label) for score, has_label in columns)


def _choose_threshold(scores: Tensor, has_label: Tensor) -> float:
    if has_label.all() or not has_label.any():
        return DEFAULT_THRESHOLD
    values = scores.unique(sorted=True)
    limits = torch.cat([(values[1:] + values[:-1]) / 2, torch.tensor([DEFAULT_THRESHOLD], dtype=torch.float64)])
    # Texts at or above each limit, and those of them that have the label, from counts over the sorted scores.
    order = scores.argsort()
    start = torch.searchsorted(scores[order], limits)
    right_below = torch.cat([torch.zeros(1, dtype=torch.int64), has_label[order].long().cumsum(0)])[start]
    right, predicted = has_label.sum() - right_below, len(scores) - start
    f1 = 2 * right / (predicted + has_label.sum())
    best = limits[f1 >= f1.max() - 1e-12]
    return float(best[(best - DEFAULT_THRESHOLD).abs().argmin()])
