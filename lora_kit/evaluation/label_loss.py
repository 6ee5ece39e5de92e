"""The loss of labels, the one that transformers computes for each `problem_type`.

    label        wᵢ · −log softmax(z)[yᵢ]                     wᵢ = weight of the sample · weight of its class
    label-set    wᵢ · Σ_c BCE(z_c, y_c)                       the weight of c multiplies the term of y_c = 1
    value        wᵢ · (z − y)²
    word         as `label`, at each word

The loss of a step is the sum over all samples of its accumulation window divided by `count`, which is what the mean of
torch's losses divides by: Σ wᵢ, and for sets of labels Σ wᵢ times the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lora_kit.data.batches import IGNORE_INDEX
from lora_kit.models.tasks import LABEL, LABEL_SET, VALUE


@dataclass(frozen=True)
class LabelLoss:
    """How the loss of labels is computed.

    Attributes:
        kind: of the samples: `label`, `label-set`, `value` or `word`.
        class_weights: weight of each class; empty where each has the weight 1.
    """

    kind: str = LABEL
    class_weights: Sequence[float] = ()

    def sum(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, smoothing: float = 0.0) -> Tensor:
        """Return the loss of a batch, summed: () in fp32.

        Args:
            logits: (rows, classes), or (rows, length, classes) for words.
            labels: as a `Collator` returns them.
            weights: of the samples: float32 (rows,); None where each has the weight 1.
            smoothing: share of the target spread evenly over all classes (Szegedy et al. 2015, arXiv 1512.00567).
        """
        logits, classes = logits.float(), self._class_weights_on(logits.device)
        if self.kind == VALUE:
            losses = functional.mse_loss(logits.squeeze(-1), labels, reduction="none")
        elif self.kind == LABEL_SET:
            losses = functional.binary_cross_entropy_with_logits(
                logits, labels, pos_weight=classes, reduction="none"
            ).sum(-1)
        else:
            has_label = labels != IGNORE_INDEX
            losses = functional.cross_entropy(
                logits[has_label], labels[has_label], weight=classes, reduction="none", label_smoothing=smoothing
            )
            weights = None if weights is None else _spread_over_words(weights, labels)[has_label]
        return losses.sum() if weights is None else (losses * weights).sum()

    def count(self, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return what the sum of the losses is divided by: (); arguments as in `sum`."""
        if self.kind in (LABEL_SET, VALUE):
            total = torch.tensor(float(len(labels))) if weights is None else weights.sum()
            return total * labels.shape[1] if self.kind == LABEL_SET else total
        has_label = labels != IGNORE_INDEX
        classes = self._class_weights_on(labels.device)
        if classes is None and weights is None:
            return has_label.sum()
        each = torch.ones_like(labels, dtype=torch.float32) if weights is None else _spread_over_words(weights, labels)
        chosen = each[has_label]
        return (chosen if classes is None else chosen * classes[labels[has_label]]).sum()

    def _class_weights_on(self, device: torch.device) -> Tensor | None:
        return torch.tensor(self.class_weights, device=device) if self.class_weights else None


def _spread_over_words(weights: Tensor, labels: Tensor) -> Tensor:
    """Return the weights of samples in the shape of their labels: (rows,), or (rows, length) for words."""
    return weights.view(-1, *[1] * (labels.ndim - 1)).expand(labels.shape)
