"""Statistics of predicted numbers and probabilities.

AUROC       how often a text with the label has a greater score than one without it; a tie counts half
Pearson     covariance / (σ σ), the correlation of two lists of numbers
Spearman    Pearson of the ranks; equal numbers share the mean of their ranks
MAE         mean |z − y|

What is not defined (one number only, all of them equal, a label that all or none have) is NaN.
"""

from __future__ import annotations

import math

from torch import Tensor


def compute_auroc(scores: Tensor, has_label: Tensor) -> float:
    """Return the area under the ROC curve (Mann and Whitney 1947): from 0 to 1, NaN without both kinds of texts.

    Args:
        scores: of the texts: (texts,).
        has_label: whether each has the label: bool (texts,).
    """
    positive, total = int(has_label.sum()), len(has_label)
    if positive in (0, total):
        return math.nan
    ranks = compute_ranks(scores)
    above = float(ranks[has_label].sum()) - positive * (positive + 1) / 2
    return above / (positive * (total - positive))


def compute_ranks(values: Tensor) -> Tensor:
    """Return the rank of each number from 1, float64; equal numbers have the mean of their ranks."""
    _, inverse, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def compute_pearson(one: Tensor, other: Tensor) -> float:
    """Return Pearson's correlation of two lists of numbers: from -1 to 1, NaN where one does not vary."""
    first, second = (values.double() - values.double().mean() for values in (one, other))
    norm = float(first.norm() * second.norm())
    return float((first * second).sum()) / norm if norm > 0 else math.nan


def compute_spearman(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of two lists of numbers: from -1 to 1, NaN where one does not vary."""
    return compute_pearson(compute_ranks(one), compute_ranks(other))


def compute_mean_absolute_error(one: Tensor, other: Tensor) -> float:
    """Return the mean distance of two lists of numbers."""
    return float((one.double() - other.double()).abs().mean())
